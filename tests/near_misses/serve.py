"""Near misses of room serve."""

from near_misses import Mutation

MUTATIONS = (
    # serve: adapters in one batch
    Mutation(
        "prefixes of one adapter are found by another",
        "serve/engine.py",
        "sample.salt = self.adapters.salt(request.adapter)",
        "pass",
        "serve/test_adapters.py::test_prefixes_of_one_adapter_are_not_anothers",
    ),
    Mutation(
        "an adapter that is loaded again under its name finds its old prefixes",
        "serve/adapters.py",
        "secrets.token_bytes(16)",
        "name.encode()",
        "serve/test_adapters.py::test_prefixes_of_one_adapter_are_not_anothers",
    ),
    Mutation(
        "the rows of a batch go through the first one's adapter",
        "serve/adapters.py",
        "if len(groups) == 1:",
        "if groups:",
        "serve/test_adapters.py::test_each_sequence_goes_through_its_own",
    ),
    # serve: structured outputs, tool calls
    Mutation(
        "samples of one request share the place in their grammar",
        "serve/structured.py",
        "return self._compiled[wanted].copy()",
        "return self._compiled[wanted]",
        "serve/test_structured.py::test_neighbours_say_what_they_say_alone_and_every_sample_has_its_own_place",
    ),
    Mutation(
        "the mask of one row falls on another",
        "serve/structured.py",
        "logits_BV[rows] = logits_BV[rows]",
        "logits_BV[: len(rows)] = logits_BV[: len(rows)]",
        "serve/test_structured.py::test_neighbours_say_what_they_say_alone_and_every_sample_has_its_own_place",
    ),
    Mutation(
        "greedy answers are free of their grammar",
        "serve/request.py",
        "self.penalised or self.logit_bias or self.structured is not None",
        "self.penalised or self.logit_bias",
        "serve/test_structured.py::test_each_kind_and_greedy",
    ),
    Mutation(
        "the start of a tool call is shown before it is known to be one",
        "serve/tools.py",
        "at = len(self.kept) - longest",
        "at = len(self.kept)",
        "serve/test_tools.py::test_calls_are_read_back",
    ),
    Mutation(
        "best_of gives the least likely",
        "serve/respond.py",
        "key=mean, reverse=True",
        "key=mean",
        "serve/test_tools.py::test_best_of_gives_the_likeliest",
    ),
    # serve: drafters
    Mutation(
        "another tree of 80 places with the same levels",
        "serve/drafters/token_recycling.py",
        "(8, 4, 3, 2, 1, 1, 1, 1),",
        "(8, 3, 3, 2, 2, 1, 1, 1),",
        "serve/test_token_recycling.py::test_the_whole_tree_is_the_papers",
    ),
    Mutation(
        "a level of the tree shuffled",
        "serve/drafters/token_recycling.py",
        "(5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1),",
        "(5, 1, 2, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1),",
        "serve/test_token_recycling.py::test_the_whole_tree_is_the_papers",
    ),
    Mutation(
        "only rows of tokens that were taken are learnt",
        "serve/propose.py",
        "self.drafter.observe(tokens_T[rows], logits_RV)",
        "self.drafter.observe(tokens_T[rows[:1]], logits_RV[:1])",
        "serve/test_token_recycling.py::test_rejected_drafts_are_recycled",
    ),
    # serve: schedulers
    Mutation(
        "fcfs preempts the oldest",
        "serve/schedulers/fcfs.py",
        "victim = latest.pop()",
        "victim = latest.pop(0)",
        "serve/test_schedulers.py::test_the_latest_is_preempted_when_decodes_need_its_blocks",
    ),
    Mutation(
        "fcfs without its reserve",
        "serve/schedulers/fcfs.py",
        "reserve = int(self.config.reserve * state.n_blocks)",
        "reserve = 0",
        "serve/test_schedulers.py::test_an_admission_leaves_the_reserve_to_those_that_run",
    ),
    Mutation(
        "sarathi without its reserve",
        "serve/schedulers/sarathi.py",
        "reserve = int(self.config.reserve * state.n_blocks) if state.running else 0",
        "reserve = 0",
        "serve/test_schedulers.py::test_an_admission_leaves_the_reserve_to_those_that_run",
    ),
    Mutation(
        "sarathi-serve without its reserve",
        "serve/schedulers/sarathi_serve.py",
        "reserve = int(self.config.reserve * state.n_blocks)",
        "reserve = 0",
        "serve/test_schedulers.py::test_an_admission_leaves_the_reserve_to_those_that_run",
    ),
    Mutation(
        "a reserve also where nobody runs",
        "serve/schedulers/fcfs.py",
        "(reserve if state.running or run else 0)",
        "reserve",
        "serve/test_schedulers.py::test_an_admission_leaves_the_reserve_to_those_that_run",
    ),
    # serve: KV policies
    Mutation(
        "the prefix cache hides the end of a prompt from a policy after a preemption",
        "serve/cache.py",
        "most = min(most, sample.request.context - self.policy.tail)",
        "most = job.length - self.policy.tail",
        "serve/test_snapkv.py::test_a_preempted_sequence_observes_its_prompts_end_again",
    ),
    Mutation(
        "thinned sequences all attend by the first one's policy",
        "serve/plan.py",
        "itertools.groupby(shared, lambda w: id(w.sample.policy))",
        "itertools.groupby(shared, lambda w: None)",
        "serve/test_kv.py::test_every_sequence_attends_by_its_own_policy",
    ),
    Mutation(
        "a policy that fails to observe ends the step",
        "serve/backends/torch.py",
        "faults[w.sample.id] = error",
        "raise error",
        "serve/test_kv.py::test_a_policy_that_fails_ends_its_own_request_alone",
    ),
    Mutation(
        "a policy that fails to choose ends the step",
        "serve/commit.py",
        "faults[sample.id] = error",
        "raise error",
        "serve/test_kv.py::test_a_policy_that_fails_ends_its_own_request_alone",
    ),
    # serve: the kernels
    Mutation(
        "positions modulo 4096",
        "serve/native/step.c",
        "float angle = (float)step->position[job % rows] * rope->angles[r];",
        "float angle = (float)(step->position[job % rows] % 4096) * rope->angles[r];",
        "serve/test_native.py::test_keys_are_turned_by_the_angle_of_their_position",
    ),
    Mutation(
        "cosines and sines rounded to bfloat16",
        "serve/native/step.c",
        "cos_sin[r] = cosf(angle) * rope->scale, cos_sin[half + r] = sinf(angle) * rope->scale;",
        "cos_sin[r] = cosf(angle) * rope->scale, cos_sin[half + r] = sinf(angle) * rope->scale;\n"
        "            if (s->m.half) for (int j = 0; j < 2; j++) {\n"
        "                uint32_t bits; memcpy(&bits, cos_sin + r + j * half, 4);\n"
        "                bits = (bits + 0x8000) & 0xffff0000u; memcpy(cos_sin + r + j * half, &bits, 4);\n"
        "            }",
        "serve/test_native.py::test_keys_are_turned_by_the_angle_of_their_position",
    ),
    Mutation(
        "all rotations as wide as the widest",
        "serve/native/step.c",
        "int64_t half = rope->rotated / 2;",
        "int64_t half = s->m.rotated / 2;",
        "serve/test_native.py::test_float32_shapes",
    ),
    Mutation(
        "keys rotated as wide as the widest rotation",
        "serve/native/attention.h",
        "half = cos_sin ? m->rope[l->rope].rotated / 2 : 0;",
        "half = cos_sin ? m->rotated / 2 : 0;",
        "serve/test_native.py::test_float32_shapes",
    ),
    Mutation(
        "memory that is short is not noticed",
        "serve/native/step.c",
        "if (!memory) *failed = 1;",
        "",
        "serve/test_native.py::test_memory_that_is_not_to_be_had_is_said",
    ),
    Mutation(
        "the state of a running step is freed at exit",
        "serve/backends/native.py",
        "self._finalizers[-1].atexit = False",
        "self._finalizers[-1].atexit = True",
        "serve/test_native.py::test_the_program_may_end_in_the_middle_of_a_step",
    ),
    # what starting costs
    Mutation(
        "the cache is written whole at start",
        "serve/coded.py",
        'if device.type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):',
        "if True:",
        "serve/test_start.py::test_memory_of_the_cache_is_taken_block_by_block",
    ),
    Mutation(
        "mapped weights count as free memory",
        "serve/config.py",
        "memory_available() - mapped_bytes()",
        "memory_available()",
        "serve/test_start.py::test_auto_is_a_part_of_what_the_control_group_leaves",
    ),
    Mutation(
        "the first token waits for the weights to be moved",
        "serve/backends/native.py",
        "if not self._mapped or not self._state:",
        "if not self._mapped:",
        "serve/test_start.py::test_weights_leave_the_files_pages_after_the_first_token",
    ),
    Mutation(
        "a third bit counts two",
        "serve/native/products.h",
        "high = _mm512_slli_epi16(some, 2);",
        "high = _mm512_slli_epi16(some, 1);",
        "serve/test_native.py::test_rows_longer_than_a_step_of_coarse_codes",
    ),
    # serve: cache forms that are fitted
    Mutation(
        "low-rank keys are of the rotated ones",
        "serve/cacheforms/cskv.py",
        "x_GNPE = self.rotations.turn(layer, x_GNPE, at_NP, back=True)",
        "x_GNPE = x_GNPE",
        "serve/test_cskv.py::test_keys_are_rotated_to_their_own_positions",
    ),
    Mutation(
        "blocks are decoded as if each began at position 0",
        "serve/coded.py",
        "        self.first_N[index_N] = first_N\n",
        "",
        "serve/test_cskv.py::test_full_rank_gives_the_tokens_of_the_plain_cache",
    ),
    Mutation(
        "asvd scales by the mean magnitude, not by its root",
        "serve/cacheforms/cskv.py",
        "torch.diag(s / tokens_NT.numel() + 1e-6)",
        "torch.diag(s / tokens_NT.numel() + 1e-6).square()",
        "serve/test_cskv.py::test_asvd_is_the_svd_of_the_scaled_weight",
    ),
    Mutation(
        "the axes of least variance are kept",
        "serve/cacheforms/_fitted.py",
        "torch.linalg.eigh(moment_II)[1].flip(-1)",
        "torch.linalg.eigh(moment_II)[1]",
        "serve/test_matryoshkakv.py::test_the_untrained_start_is_pca",
    ),
    Mutation(
        "codes are decoded without the mean",
        "serve/cacheforms/matryoshkakv.py",
        "heads = [c @ p[:, :r].T + m for",
        "heads = [c @ p[:, :r].T + 0 * m for",
        "serve/test_matryoshkakv.py::test_codes_are_the_first_coordinates_about_the_mean",
    ),
    Mutation(
        "one rank is drawn for all layers and heads",
        "serve/cacheforms/matryoshkakv.py",
        "levels_2LG = torch.randint(1, LEVELS + 1, (2, L, G), generator=ranks)",
        "levels_2LG = torch.randint(1, LEVELS + 1, (1, 1, 1), generator=ranks).expand(2, L, G)",
        "serve/test_matryoshkakv.py::test_ranks_are_drawn_for_each_layer_and_head",
    ),
    # serve: guides
    Mutation(
        "the weight is of the whole sum",
        "serve/guides/eft.py",
        "main + c.weight * (tuned - base)",
        "c.weight * (main + tuned - base)",
        "serve/test_eft.py::test_three_tokens_by_hand",
    ),
    Mutation(
        "the difference has the wrong sign",
        "serve/guides/eft.py",
        "c.weight * (tuned - base)",
        "c.weight * (base - tuned)",
        "serve/test_eft.py::test_three_tokens_by_hand",
    ),
    Mutation(
        "accepted drafts are moved in the main model's cache alone",
        "serve/cache.py",
        "                x.move(*rows)",
        "                x.move(*rows) if storage is self.storage else None",
        "serve/test_eft.py::test_drafts_are_moved_in_every_cache",
    ),
    Mutation(
        "the token that reaches the nucleus is not in it",
        "serve/guides/eft.py",
        "before_RV = sorted_RV.cumsum(-1) - sorted_RV",
        "before_RV = sorted_RV.cumsum(-1)",
        "serve/test_eft.py::test_tokens_outside_the_main_nucleus_are_left_out",
    ),
)

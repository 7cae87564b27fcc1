"""Near misses of room evaluate."""

from near_misses import Mutation

MUTATIONS = (
    # laws and evaluation
    Mutation(
        "the Fisher matrix is taken at the labels of the text",
        "evaluate/curvature.py",
        'drawn = nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")',
        'drawn = nn.functional.cross_entropy(logits_TV, targets_1T[0], reduction="sum")',
        "evaluate/test_flatness.py::test_traces_against_explicit_matrices",
    ),
    Mutation(
        "the gradient of the mean is squared",
        "evaluate/curvature.py",
        'drawn = nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")',
        "drawn = nn.functional.cross_entropy(logits_TV, labels_T)",
        "evaluate/test_flatness.py::test_traces_against_explicit_matrices",
    ),
    Mutation(
        "a sub-problem at the threshold is thought about",
        "evaluate/solvers/scale_tts.py",
        "yield slow if difficulty(score.text) > c.threshold else fast",
        "yield slow if difficulty(score.text) >= c.threshold else fast",
        "evaluate/test_solvers.py::test_modes_follow_the_threshold_strictly",
    ),
    Mutation(
        "a sub-problem's reasoning is passed on",
        "evaluate/solvers/scale_tts.py",
        "solved.append((step, problem.extract(text)))",
        "solved.append((step, text))",
        "evaluate/test_solvers.py::test_a_step_sees_earlier_answers_and_no_reasoning",
    ),
    Mutation(
        "outlines and ratings of a solver cost nothing",
        "evaluate/solvers/__init__.py",
        "result.tokens += sum(r.tokens for r in replies)",
        "result.tokens += 0 if call.wrap else sum(r.tokens for r in replies)",
        "evaluate/test_solvers.py::test_every_token_is_counted_outlines_and_ratings_too",
    ),
    Mutation(
        "a model that is worse than guessing knows less than nothing",
        "evaluate/biographies.py",
        "bits += max(math.log2(size) - nats[kind] / math.log(2), 0.0)",
        "bits += math.log2(size) - nats[kind] / math.log(2)",
        "evaluate/test_knowledge_capacity.py::test_bits_of_models_that_know_all_and_nothing",
    ),
    Mutation(
        "a name is scored after the words before it",
        "evaluate/tasks/knowledge_capacity.py",
        "requests = [Choose(before, (name,))]",
        'requests = [Choose(f"{name} was", (name,))]',
        "evaluate/test_knowledge_capacity.py::test_what_is_scored_stands_in_the_training_text",
    ),
    Mutation(
        "every checkpoint is scored with the final weights",
        "evaluate/checkpoints.py",
        'safe_open(self.folder / "model.safetensors"',
        'safe_open(sorted(self.folder.parent.glob("step-*"))[-1] / "model.safetensors"',
        "evaluate/test_checkpoints.py::test_each_checkpoint_has_its_own_weights",
    ),
    Mutation(
        "a statement cited in training is cited in the test",
        "evaluate/tasks/citing.py",
        '(side(q[0]) == "test") == (split == "test")',
        "bool(side(q[0]))",
        "evaluate/test_casehold.py::test_the_right_statement_is_the_cited_one",
    ),
    Mutation(
        "paired items are tested as if they were independent samples",
        "evaluate/compare.py",
        'verdict |= {"p": mcnemar(a.tolist(), b.tolist())["p"]}',
        'verdict |= {"p": unpaired(a.tolist(), b.tolist())["p"]}',
        "evaluate/test_compare.py::test_two_points_of_a_thousand_items_are_found_by_the_paired_test_alone",
    ),
    Mutation(
        "clusters are ignored",
        "evaluate/compare.py",
        "    if clusters_N is None:\n        return float(values",
        "    if True:\n        return float(values",
        "evaluate/test_compare.py::test_clustered_errors",
    ),
    Mutation(
        "an object may agree with everything",
        "evaluate/_sandboxed.py",
        "        if not own(value):",
        "        if False:",
        "evaluate/test_sandbox.py::test_escapes_fail_in_time",
    ),
    Mutation(
        "processes may be started in the sandbox",
        "evaluate/_jail.py",
        "code += [(give, 0, 0, allow), (give, 0, 0, denied)]",
        "code += [(give, 0, 0, allow), (give, 0, 0, allow)]",
        "evaluate/test_sandbox.py::test_no_other_process_can_be_killed",
    ),
    Mutation(
        "the next token is the mean of the conditionals over labels",
        "evaluate/grammar.py",
        "total = sum((self.joint(sentence, one) for one in every)",
        "total = sum((self.joint(sentence, one) ** 0.5 for one in every)",
        "evaluate/test_grammar.py::test_next_token_against_enumeration",
    ),
    Mutation(
        "a hit is reported without its last words",
        "evaluate/contamination.py",
        "start, end = item_words[run[0]][1], item_words[run[1]][2]",
        "start, end = item_words[run[0]][1], item_words[run[0]][2]",
        "evaluate/test_contamination.py::test_a_planted_item_is_found_with_its_span",
    ),
    Mutation(
        "acc_norm divides by characters",
        "evaluate/multiple_choice.py",
        'max(1, len(c.encode("utf-8", "surrogatepass"))) for c in doc["choices"]',
        'max(1, len(c)) for c in doc["choices"] if c',
        "evaluate/test_wordings.py::test_normalisations_stand_side_by_side",
    ),
)

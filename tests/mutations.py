"""Near misses that the tests must catch: wrong programs that look right, one change of the sources each.

    python tests/mutations.py [WORD ...] [--list]

copies the package and the tests to a temporary folder, plants one mutation after another there, and runs the test that
must fail for it. WORD picks those whose file, test or description has it. Exits with 1 if a mutation lives.

A test that was never seen failing may test nothing: whoever writes a method adds the mistake that is easiest to make.
`old` must occur once in the file. `tests/test_mutations.py` checks that, and runs all of them where slow tests run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # for one test


@dataclass(frozen=True, slots=True)
class Mutation:
    what: str
    file: str  # below src/modicum
    old: str
    new: str
    test: str  # below tests, as pytest is given it: FILE or FILE::NAME


MUTATIONS = (
    # data: codecs
    Mutation(
        "the coder starts anew at each window, its model does not",
        "data/codecs/neural_compression.py",
        "first, last = self.child(data[at:end], low, high, data[end])",
        "first, last = self.child(data[:end], low, high, data[end])",
        "data/test_codec.py::test_a_window_means_the_same_wherever_it_stands",
    ),
    Mutation(
        "no code says that a window ends",
        "data/codecs/neural_compression.py",
        "low, spare = low + 1, 0",
        "low, spare = low, 0",
        "data/test_codec.py::test_every_code_is_one_window_and_every_window_one_code",
    ),
    # data: rewriting
    Mutation(
        "only rephrasings are kept",
        "data/rewrites/wrap.py",
        "out: list[Document | Drop] = [document]",
        "out: list[Document | Drop] = []",
        "data/test_rewrite.py::test_wrap_adds_rephrasings_and_keeps_the_original",
    ),
    Mutation(
        "the first marked part is taken, the last is the final one",
        "data/rewrites/_text.py",
        "(matches[-1].strip() or None)",
        "(matches[0].strip() or None)",
        "data/test_rewrite.py::test_only_what_is_between_complete_marks_is_taken",
    ),
    Mutation(
        "thoughts come before the document",
        "data/rewrites/tpt.py",
        "text=text + self.config.separator + thoughts",
        "text=thoughts + self.config.separator + text",
        "data/test_rewrite.py::test_tpt_puts_thoughts_after_the_document_and_cuts_it_exactly",
    ),
    Mutation(
        "a passage's language is not looked at",
        "data/rewrites/rephrase_multilingual.py",
        "(other := language_of(text)) != code",
        "(other := code) != code",
        "data/test_rewrite.py::test_a_reply_in_another_language_is_refused",
    ),
    Mutation(
        "any result of the teacher will do",
        "data/rewrites/math_synthesis.py",
        "if not same(answer_of(text), answer_of(solution)):",
        "if answer_of(text) is None:",
        "data/test_rewrite.py::test_tutor_keeps_right_verdicts_with_right_results_only",
    ),
    Mutation(
        "the right option always stands first",
        "data/rewrites/restructured.py",
        "right = int(rng.integers(len(options) + 1))",
        "right = 0",
        "data/test_rewrite.py::test_the_right_option_stands_anywhere",
    ),
    Mutation(
        "a twin passes that the gate has reasons against",
        "data/rewrites/sam_mimicry.py",
        "            if not reasons:",
        "            if twin:",
        "data/test_rewrite.py::test_no_secret_survives_the_gate",
    ),
    # data: related rows and rows of other lengths
    Mutation(
        "on to the least similar neighbour, as the paper's algorithm is printed",
        "data/orders/in_context_pretraining.py",
        "at = min(open_)[1] if open_ else None",
        "at = max(open_)[1] if open_ else None",
        "data/test_arranging.py::test_the_path_is_the_papers",
    ),
    Mutation(
        "a jump goes to the document of most neighbours",
        "data/orders/in_context_pretraining.py",
        "key=lambda i: (len(edges[i]), i)",
        "key=lambda i: (-len(edges[i]), i)",
        "data/test_arranging.py::test_the_path_is_the_papers",
    ),
    Mutation(
        "the next row of a domain goes on in the row of another",
        "data/stream.py",
        "if begun and not self.sampler.within_row:",
        "if begun and not self.sampler.domains:",
        "data/test_arranging.py::test_rows_are_of_one_domain_and_follow_the_path",
    ),
    Mutation(
        "small parts are cut first",
        "data/packings/dataset_decomposition.py",
        "size = min(1 << (span.length.bit_length() - 1), longest)",
        "size = min(span.length & -span.length, longest)",
        "data/test_arranging.py::test_parts_are_binary_digits",
    ),
    Mutation(
        "long rows come first in a cycle",
        "data/packings/dataset_decomposition.py",
        "** (k - 1 - i) for i in range(k)]",
        "** i for i in range(k)]",
        "data/test_arranging.py::test_short_rows_come_first_in_a_cycle_and_long_ones_last",
    ),
    # data: pages and filters
    Mutation(
        "a formula's tail is lost with the formula",
        "data/web.py",
        'text += node.tail or ""',
        'text += ""',
        "data/test_web.py::test_every_formula_comes_back_in_order",
    ),
    Mutation(
        "a record that ends early is read as if it were whole",
        "data/web.py",
        "if not whole:",
        "if not body:",
        "data/test_web.py::test_a_crawl_that_ends_early_says_where",
    ),
    Mutation(
        "a bound of Gopher's that counts as broken when it is met",
        "data/steps/gopher.py",
        "if letters < 0.8:",
        "if letters <= 0.8:",
        "data/test_filters.py::test_a_bound_that_is_met_is_kept",
    ),
    Mutation(
        "duplicate n-grams that overlap are counted twice",
        "data/steps/gopher.py",
        "            at += n\n",
        "            at += 1\n",
        "data/test_filters.py::test_decisions_are_datatroves",
    ),
    Mutation(
        "a hit of n - 1 words counts",
        "data/steps/decontaminate.py",
        "size = min(self.config.n, len(words))",
        "size = min(self.config.n - 1, len(words))",
        "data/test_filters.py::test_a_benchmarks_text_is_dropped_with_its_span",
    ),
    Mutation(
        "private addresses are masked",
        "data/steps/pii.py",
        "return ipaddress.ip_address(text).is_global",
        "return bool(ipaddress.ip_address(text))",
        "data/test_filters.py::test_what_names_nobody_stays",
    ),
    Mutation(
        "damaged files are no reason for an exit code",
        "cli/curate.py",
        "    if any(failures.values()):\n        raise typer.Exit(1)",
        "    if any(failures.values()):\n        raise typer.Exit(0)",
        "data/test_faults.py::test_damage_is_named_and_the_rest_is_done",
    ),
    # data: mixtures
    Mutation(
        "the mixture changes after `fraction` of the run instead of before the last `fraction`",
        "data/mixtures/domain_upsampling.py",
        "if done < (1 - self.config.fraction) * total",
        "if done < self.config.fraction * total",
        "data/test_training_ports.py::test_upsampling_serves_what_its_closed_form_says",
    ),
    Mutation(
        "a boost is added instead of multiplied",
        "data/mixtures/domain_upsampling.py",
        "w * config.boost.get(d, 1.0)",
        "w + config.boost.get(d, 0.0)",
        "data/test_training_ports.py::test_boost_multiplies_the_natural_weights",
    ),
    # data: selections
    Mutation(
        "betr ranks by cosine, so that a tight benchmark takes everything",
        "data/steps/betr.py",
        "return np.lexsort((np.arange(n), -cosine_N, least_N))",
        "return np.lexsort((np.arange(n), -(sample_ND @ examples_ED.T).max(axis=1)))",
        "data/test_selection.py::test_betr_serves_a_loose_benchmark_as_well_as_a_tight_one",
    ),
    Mutation(
        "a selection keeps a share of the documents instead of the text",
        "data/steps/_selection.py",
        "before = np.cumsum(sizes_N[order]) - sizes_N[order]",
        "before = np.arange(len(sizes_N)) * sizes_N.mean()",
        "data/test_selection.py::test_the_cut_is_one_of_text_and_not_of_documents",
    ),
    Mutation(
        "a large benchmark gives more examples",
        "data/steps/_selection.py",
        "permutation(len(texts))[:count])]",
        "permutation(len(texts))[:most])]",
        "data/test_selection.py::test_every_benchmark_gives_as_many_examples",
    ),
    Mutation(
        "preselect keeps what better models predict worse",
        "data/steps/preselect.py",
        "losses_NM[:, i] > losses_NM[:, j]",
        "losses_NM[:, i] < losses_NM[:, j]",
        "data/test_selection.py::test_strength_is_kendalls_tau",
    ),
    Mutation(
        "a tie of two models counts as right",
        "data/steps/preselect.py",
        "losses_NM[:, i] > losses_NM[:, j]",
        "losses_NM[:, i] >= losses_NM[:, j]",
        "data/test_selection.py::test_strength_is_kendalls_tau",
    ),
    Mutation(
        "gotd with the sign of the gradient swapped",
        "data/steps/gotd.py",
        "return f_N if self.config.contrast else -f_N",
        "return -f_N if self.config.contrast else f_N",
        "data/test_selection.py::test_gotd_takes_what_is_new_and_not_what_is_near",
    ),
    Mutation(
        "the calibrated gradient subtracts the mean of all potentials",
        "data/transport.py",
        "return (len(f_A) * f_A - f_A.sum()) / (len(f_A) - 1)",
        "return f_A - f_A.mean()",
        "data/test_selection.py::test_the_calibrated_gradient_is_the_exact_problems",
    ),
    Mutation(
        "every cluster is thinned at one rate",
        "data/steps/concept_pruning.py",
        "quota_K = quotas(softmax(complexity_K / config.temperature),",
        "quota_K = quotas(size_K / n,",
        "data/test_selection.py::test_pruning_thins_the_dense_cluster_and_its_prototypes",
    ),
    Mutation(
        "the prototypes stay",
        "data/steps/concept_pruning.py",
        "-distance_N[members] if config.hard",
        "distance_N[members] if config.hard",
        "data/test_selection.py::test_pruning_thins_the_dense_cluster_and_its_prototypes",
    ),
    Mutation(
        "the threshold of recall is the one of the other tail",
        "data/steps/infimm_webmath.py",
        "np.floor((1 - recall) * len(ordered) + 1e-9)",
        "np.floor(recall * (len(ordered) - 1) + 1e-9)",
        "data/test_selection.py::test_thresholds_by_counting",
    ),
    Mutation(
        "a column is used again for other texts",
        "data/signals.py",
        "fingerprint([asdict(maker), digest(texts)])",
        "fingerprint([asdict(maker), len(texts)])",
        "data/test_selection.py::test_a_column_is_used_again_for_the_same_texts_and_maker_only",
    ),
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
    # compress and model: perp
    Mutation(
        "the reconstruction's gradient fills the zeros",
        "compress/compressors/perp.py",
        "slope_OI = (through_OI * (2 * scaling / first)).masked_fill_(~live_OI, 0)",
        "slope_OI = through_OI * (2 * scaling / first)",
        "compress/test_perp.py::test_steps_are_those_of_autograd",
    ),
    Mutation(
        "the update is merged without its mask",
        "model/linear/perp.py",
        "return weight_OI + self.scaling * product_OI * self.mask()",
        "return weight_OI + self.scaling * product_OI",
        "model/test_linear_perp.py::test_zeros_survive_training_and_merging",
    ),
    Mutation(
        "all ranks of ScaleLoRA start alike",
        "model/linear/perp.py",
        "self.A.copy_(root + noise_RI - noise_RI.mean(0))",
        "self.A.copy_(torch.full_like(noise_RI, root))",
        "model/test_linear_perp.py::test_ranks_of_the_scale_are_not_alike",
    ),
    # compress: fewer key/value heads
    Mutation(
        "queries are turned the wrong way",
        "compress/compressors/kv_head_compression.py",
        "return as_real(u_A.conj()[:, None] * as_complex(weight_OI, dim))",
        "return as_real(u_A[:, None] * as_complex(weight_OI, dim))",
        "compress/test_kv_head_compression.py::test_scores_are_the_same_at_any_positions",
    ),
    Mutation(
        "neighbouring dimensions are taken for a rotated pair",
        "compress/compressors/kv_head_compression.py",
        "first, second = weight_OI.unflatten(0, (-1, 2, dim // 2)).unbind(1)",
        "first, second = weight_OI.unflatten(0, (-1, dim // 2, 2)).unbind(2)",
        "compress/test_kv_head_compression.py::test_scores_are_the_same_at_any_positions",
    ),
    Mutation(
        "the directions of least variance are kept",
        "compress/compressors/kv_head_compression.py",
        "return torch.linalg.eigh(weight_OI @ gram_II @ weight_OI.T)[1][:, -dim:]",
        "return torch.linalg.eigh(weight_OI @ gram_II @ weight_OI.T)[1][:, :dim]",
        "compress/test_kv_head_compression.py::test_directions_are_numpys",
    ),
    # pipeline: squeeze
    Mutation(
        "the error of a difference is that of its two sides apart",
        "pipeline/stages/compare.py",
        "left = [m - mean * size for m, size in zip(more, sizes, strict=True)]",
        "left = [m.nats / math.log(2) for m in made]",
        "pipeline/test_squeeze.py::test_differences_are_paired",
    ),
    # compress: loram
    Mutation(
        "the most important channels are cut",
        "compress/compressors/loram.py",
        '"channels": sorted(channels[: round(c.mlp * down.shape[1])].tolist()),',
        '"channels": sorted(channels[len(channels) - round(c.mlp * down.shape[1]) :].tolist()),',
        "compress/test_loram.py::test_the_least_important_go_and_the_ends_stay",
    ),
    Mutation(
        "a group goes with as many query heads as key heads",
        "compress/compressors/loram.py",
        "for n in (dim, len(attention.q.weight) // kv_heads))",
        "for n in (dim, dim))",
        "compress/test_loram.py::test_a_group_goes_with_its_query_heads",
    ),
    Mutation(
        "an adapter of inputs comes back to the first columns",
        "adapt/recover.py",
        "target.A[:, positions(weights[name].T, whole[name].T, name)] = a_RI.to(target.A.dtype)",
        "target.A[:, : a_RI.shape[1]] = a_RI.to(target.A.dtype)",
        "compress/test_loram.py::test_an_adapter_comes_back_to_its_rows_and_columns",
    ),
    # train: distillers
    Mutation(
        "the perturbation counts only above eps",
        "train/distillers/pela.py",
        "- self.config.eps).square()",
        "- self.config.eps).clamp_min(0).square()",
        "train/test_pela.py::test_the_maximum_reaches_one_entry_of_a_matrix",
    ),
    Mutation(
        "the rank is a ratio of the full rank instead of the numbers",
        "model/linear/lowrank.py",
        "int(inputs * outputs / (ratio * (inputs + outputs)))",
        "int(min(inputs, outputs) / ratio)",
        "train/test_pela.py::test_factors_are_the_truncated_svd",
    ),
    Mutation(
        "the teacher's term loses its T squared",
        "train/distillers/_teacher.py",
        "return temperature**2 * (t_NV.exp() * (t_NV - s_NV)).sum(-1)",
        "return (t_NV.exp() * (t_NV - s_NV)).sum(-1)",
        "train/test_distillers.py::test_logit_loss_is_the_papers",
    ),
    Mutation(
        "tokens without loss are distilled",
        "train/distillers/_teacher.py",
        "return (of(student.head(x_ND), teacher_NV) * mask_N[start:stop]).sum()",
        "return of(student.head(x_ND), teacher_NV).sum()",
        "train/test_distillers.py::test_logit_loss_is_the_papers",
    ),
    Mutation(
        "the student's probabilities are renormalised over the teacher's likeliest tokens too",
        "train/distillers/_teacher.py",
        "t_NV, s_NV = torch.log_softmax(t_NV, -1), s_NV.gather(-1, kept)",
        "t_NV, s_NV = torch.log_softmax(t_NV, -1), torch.log_softmax(s_NV.gather(-1, kept), -1)",
        "train/test_distillers.py::test_top_tokens_are_renormalised_and_their_mass_reported",
    ),
    Mutation(
        "layers are mapped from the first one on",
        "train/distillers/_teacher.py",
        "return [max(1, round((i + 1) * teacher / student)) - 1 for i in range(student)]",
        "return [min(round(i * teacher / student), teacher - 1) for i in range(student)]",
        "train/test_distillers.py::test_features_are_mapped_by_depth_and_width",
    ),
    Mutation(
        "pretrained distillation keeps the text's own labels",
        "train/distillers/pretrained_distillation.py",
        "return 0.0",
        "return 0.5",
        "train/test_distillers.py::test_pretrained_distillation_is_cross_entropy_with_the_teacher",
    ),
    Mutation(
        "the zero frequency is cut over the width instead of the positions",
        "train/distillers/scalekd.py",
        "return x_BTD - x_BTD.mean(1, keepdim=True)",
        "return x_BTD - x_BTD.mean(2, keepdim=True)",
        "train/test_distillers.py::test_the_second_view_is_a_cosine_transform_without_its_mean",
    ),
    Mutation(
        "features are normalised over the positions",
        "train/distillers/scalekd.py",
        "return F.layer_norm(x_BTD.float(), x_BTD.shape[-1:])",
        "return F.layer_norm(x_BTD.float().transpose(1, 2), x_BTD.shape[1:2]).transpose(1, 2)",
        "train/test_distillers.py::test_the_second_view_is_a_cosine_transform_without_its_mean",
    ),
    Mutation(
        "the projector attends to later positions",
        "train/distillers/scalekd.py",
        "dtype=torch.bool, device=like_BT.device).tril()",
        "dtype=torch.bool, device=like_BT.device)",
        "train/test_distillers.py::test_a_projector_sees_no_later_position",
    ),
    # data: orders, transforms, packings; train: averaging
    Mutation(
        "documents of equal quality come as they are stored",
        "data/orders/quality_ascending.py",
        "numbers = epoch.shuffled()",
        "numbers = np.arange(epoch.chunks, dtype=np.uint64)",
        "data/test_training_ports.py::test_ties_are_shuffled_by_seed_and_epoch_and_not_by_how_they_are_stored",
    ),
    Mutation(
        "a short run ascends over the whole epoch and reads the worst of it",
        "data/orders/quality_ascending.py",
        "if epoch.remaining is not None:",
        "if epoch.remaining is None:",
        "data/test_training_ports.py::test_a_run_that_ends_within_the_epoch_still_reads_the_best",
    ),
    Mutation(
        "metadata is learnt",
        "data/transforms/meco.py",
        "np.concatenate([np.full(len(prefix), NO_LOSS), tokens.targets_N])",
        "np.concatenate([prefix, tokens.targets_N])",
        "data/test_order.py::test_metadata_is_read_and_never_learnt",
    ),
    Mutation(
        "metadata stands before the start token",
        "data/transforms/meco.py",
        "opening = int(span.start == 0)",
        "opening = 0",
        "data/test_order.py::test_metadata_is_read_and_never_learnt",
    ),
    Mutation(
        "whole documents are cut where transforms add tokens",
        "data/stream.py",
        "if free > 0 and (self.packing.splits or not fitted):",
        "if free > 0:",
        "data/test_training_ports.py::test_what_transforms_add_pushes_whole_documents_into_the_next_row",
    ),
    Mutation(
        "the deficit is not charged to the domain that was drawn from",
        "data/sampler.py",
        "chosen.deficit -= span.length",
        "chosen.deficit -= 0",
        "data/test_stream.py",
    ),
    Mutation(
        "ema without its faster beginning: a short run keeps its first weights",
        "train/averaging/ema.py",
        "return max(1 - c.decay, (1 + c.gamma) / (count + 1 + c.gamma))",
        "return 1 - c.decay",
        "train/test_averaging.py::test_ema_is_the_sum_over_all_steps_with_the_weights_of_its_equation",
    ),
    Mutation(
        "lawa averages a checkpoint from before its window",
        "train/averaging/lawa.py",
        "for k in range(c.checkpoints)]",
        "for k in range(c.checkpoints + 1)]",
        "train/test_averaging.py::test_lawa_reaches_over_its_window_and_no_further",
    ),
    Mutation(
        "what a method brings replaces what was chosen",
        "core/compose.py",
        "(c.method == half.method or not several)",
        "c.method == half.method",
        "core/test_compose.py::test_what_was_chosen_keeps_out_what_is_brought_where_a_port_takes_one_method",
    ),
    # bench: evidence
    Mutation(
        "imports within functions are not followed",
        "bench/code.py",
        "        else:\n            yield from _imports(node)",
        "        elif isinstance(node, ast.If | ast.Try):\n            yield from _imports(node)",
        "bench/test_code.py::test_imports_are_read_as_text",
    ),
    Mutation(
        "any record of the lab is taken on resuming, whatever code made it",
        "bench/harness.py",
        "if r.lab.id == lab.id and r.code == codes.get(r.method) and",
        "if r.lab.id == lab.id and",
        "bench/test_code.py::test_other_code_is_measured_again_and_takes_the_place_of_the_old",
    ),
    Mutation(
        "rows of two labs are joined",
        "bench/figures.py",
        "groups.setdefault(record.lab.id, []).append(record)",
        "groups.setdefault(record.lab.settings, []).append(record)",
        "bench/test_catalogue.py::test_each_lab_is_a_table_of_its_own",
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
        "weights are mapped for all readers to write to",
        "model/safetensor.py",
        "access=mmap.ACCESS_COPY",
        "access=mmap.ACCESS_READ",
        "model/test_safetensor.py",
    ),
    Mutation(
        "pages of freed tensors stay",
        "model/safetensor.py",
        "mapped.madvise(mmap.MADV_DONTNEED, first, last - first)",
        "pass",
        "model/test_safetensor.py::test_memory_is_taken_as_it_is_read_and_given_back_tensor_by_tensor",
    ),
    Mutation(
        "the first token waits for the weights to be moved",
        "serve/backends/native.py",
        "if not self._mapped or not self._state:",
        "if not self._mapped:",
        "serve/test_start.py::test_weights_leave_the_files_pages_after_the_first_token",
    ),
    Mutation(
        "the embedding draws numbers that nobody reads",
        "model/decoder.py",
        "return nn.Embedding(rows, width, _weight=torch.empty(rows, width))",
        "return nn.Embedding(rows, width)",
        "serve/test_start.py::test_chat_and_serve_import_nothing_they_do_not_need",
    ),
    Mutation(
        "a control group's limit is taken for what is left of it",
        "budget/machine.py",
        "headroom = [max(0, limit - used) for limit, used in _memory_groups(Path(root))]",
        "headroom = [limit for limit, used in _memory_groups(Path(root))]",
        "budget/test_machine.py::test_a_container_sees_its_limit_and_what_is_left_of_it",
    ),
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
        "a time buys more FLOPs per second from a larger model",
        "laws/plan.py",
        "* np.maximum(size_N / self.largest, 1)",
        "",
        "laws/test_plan.py::test_a_time_buys_tokens_at_the_measured_rate",
    ),
    Mutation(
        "a run that goes on from a model counts as one from scratch",
        "pipeline/records.py",
        'return not recipe.sources(name)["model"] and',
        "return",
        "laws/test_plan.py::test_records_of_runs",
    ),
    Mutation(
        "an exponent without a prior is bounded by nothing",
        "laws/estimate.py",
        "above_KF = np.maximum(phi_KF - self.upper_F, 0) / WALL",
        "above_KF = 0 * phi_KF",
        "laws/test_fit.py::test_upper_limits_touch_nothing_below_and_slope_back_above",
    ),
    Mutation(
        "the average size of a run is over rounds, not tokens",
        "laws/forms/average_params.py",
        "(sizes[:-1] * np.diff(at)).sum() / (at[-1] - at[0])",
        "sizes[:-1].mean()",
        "laws/test_forms.py::test_average_of_schedules",
    ),
    Mutation(
        "a repeated token is worth as much as a new one",
        "laws/forms/token_crisis.py",
        "-decay_K1 * np.expm1(-np.maximum(np.expm1(np.maximum(log_ratio, 0.0)), 0.0) / decay_K1)",
        "np.expm1(np.maximum(log_ratio, 0.0)) + 0 * decay_K1",
        "laws/test_forms.py::test_repetition_is_a_sum_of_decaying_showings",
    ),
    Mutation(
        "the critical batch does not depend on the loss",
        "laws/forms/scaling_laws_unraveled.py",
        "log_batch - slope * (log_loss - np.log(self.config.at_loss))",
        "log_batch + 0 * slope * log_loss",
        "laws/test_forms.py::test_loss_solves_the_equation_with_itself_inside",
    ),
    Mutation(
        "the warm-up is cut as a share of each run",
        "laws/forms/hitchhikers_laws.py",
        '(table["tokens"] > c.cut)',
        '(table["tokens"] > 0)',
        "laws/test_forms.py::test_the_warm_up_must_be_cut_by_tokens",
    ),
    Mutation(
        "a mixture is chosen by ascent although V is a loss",
        "laws/forms/projektor.py",
        'sign = -1.0 if self.target == "loss" else 1.0',
        "sign = 1.0",
        "laws/test_mixtures_and_text.py::test_projektor_goes_through_its_sizes_and_finds_the_best_mixture",
    ),
    Mutation(
        "records of the query's own source are asked",
        "laws/forms/precog.py",
        "keep = sources != source",
        "keep = np.arange(len(sources)) != i",
        "laws/test_mixtures_and_text.py::test_records_of_the_same_source_are_not_asked",
    ),
    Mutation(
        "binomial noise of few items is forgotten",
        "laws/curve.py",
        "np.sqrt(1 + inner_N * (1 - inner_N) / items_N / (2 * self.config.noise**2))",
        "np.ones_like(inner_N * items_N)",
        "laws/test_forms.py::test_end_to_end_equation_and_binomial_intervals",
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
    # compress: compressors
    Mutation(
        "columns beyond a group do not make up for it",
        "compress/compressors/gptq.py",
        "weight_OI[:, stop:] -= torch.stack(errors, 1) @ U_II[start:stop, stop:]",
        "weight_OI[:, stop:] -= 0 * (torch.stack(errors, 1) @ U_II[start:stop, stop:])",
        "compress/test_compressor_quantisers.py::test_gptq_gives_the_codes_of_naive_obq",
    ),
    Mutation(
        "the zero point follows the error, not what is left of the weight without it",
        "compress/compressors/hqq.py",
        "(codes - (weight_OGi - error) / step)",
        "(codes - (weight_OGi + error) / step)",
        "compress/test_compressor_quantisers.py::test_hqq_first_step_is_the_equation",
    ),
    Mutation(
        "alphas are tried on weights that stay scaled up",
        "compress/compressors/awq.py",
        ".weight(weight_OI.dtype) / s_I",
        ".weight(weight_OI.dtype)",
        "compress/test_compressor_quantisers.py::test_awq_takes_the_alpha_of_least_error_of_the_inspected_module",
    ),
    Mutation(
        "the rows of up are not divided by what the inputs of down are multiplied with",
        "compress/compressors/awq.py",
        "weight.data = weight.data / s_I[:, None]",
        "weight.data = weight.data",
        "compress/test_compressor_quantisers.py::test_awq_scaling_changes_no_output_before_rounding",
    ),
    Mutation(
        "the least of the matrix instead of each row",
        "compress/compressors/wanda.py",
        "else smallest(score_OI, self.config.sparsity)",
        "else smallest(score_OI.flatten(), self.config.sparsity).view_as(score_OI)",
        "compress/test_compressor_pruners.py::test_wanda_cuts_the_least_of_each_row_by_weight_times_norm",
    ),
    Mutation(
        "the mask by size alone, without the inverse's pivots",
        "compress/compressors/sparsegpt.py",
        "score = (W[:, start:stop] / scale_I[start:stop]).square()",
        "score = W[:, start:stop].square()",
        "compress/test_compressor_pruners.py::test_sparsegpt_is_algorithm_1_with_explicit_inverses",
    ),
    Mutation(
        "layers that are left keep their old places",
        "compress/compressors/shortgpt.py",
        "layer.attention.layer = number",
        "layer.attention.layer = index",
        "compress/test_compressor_pruners.py::test_a_layer_that_does_nothing_goes_first",
    ),
    Mutation(
        "the gradient passes through the clamp of the code",
        "compress/compressors/efficientqat.py",
        "through = grad * inside",
        "through = grad * torch.ones_like(inside)",
        "compress/test_efficientqat.py::test_gradients_are_the_published_ones_inside_and_outside_the_range",
    ),
    Mutation(
        "the zero point is rounded at the start only",
        "compress/compressors/efficientqat.py",
        "zero.round().clamp(0, top)",
        "zero.clamp(0, top)",
        "compress/test_efficientqat.py::test_what_is_stored_is_what_was_trained",
    ),
    Mutation(
        "the target is what goes into the original block",
        "compress/blocks.py",
        "self._inputs(index + 1, ORIGINAL)",
        "self._inputs(index, ORIGINAL)",
        "compress/test_efficientqat.py::test_a_block_learns_from_the_quantised_prefix_what_the_original_gives",
    ),
    Mutation(
        "twice the bytes of the budget",
        "compress/allocate.py",
        "-np.inf, 1)",
        "-np.inf, 2)",
        "compress/test_allocate.py::test_an_allocation_is_the_best_of_all",
    ),
    Mutation(
        "all outputs count alike",
        "compress/sensitivity.py",
        ".double() * gradient_O)",
        ".double() * gradient_O.mean())",
        "compress/test_allocate.py::test_an_estimate_is_half_the_weighted_error",
    ),
    Mutation(
        "gradients of a value are summed before its own slope",
        "compress/compressors/edkm.py",
        "return grad * slope + same",
        "return _spread((sum_U / count_U).to(grad.dtype), present, pattern) * slope + same",
        "compress/test_palette.py::test_edkm_is_dkm_with_a_row_for_each_value",
    ),
    Mutation(
        "the path through the table is dropped",
        "compress/compressors/edkm.py",
        "return grad * slope + same",
        "return grad * slope",
        "compress/test_palette.py::test_edkm_is_dkm_with_a_row_for_each_value",
    ),
    Mutation(
        "NormalFloat counts its zero twice",
        "model/linear/palette.py",
        "half + 1, dtype=torch.float64)[1:]",
        "half, dtype=torch.float64)",
        "compress/test_palette.py::test_normal_float_is_the_known_table",
    ),
    Mutation(
        "the iterate after the best is kept",
        "model/linear/lqlora.py",
        "if best is not None and error >= best.error:",
        "if best is not None and best.error < 0:",
        "compress/test_lqlora.py::test_the_alternation_is_the_published_one_and_keeps_the_best",
    ),
    Mutation(
        "factors of the weighted matrix are taken for its own",
        "model/linear/lqlora.py",
        "up_OR / d1[:, None], down_RI / d2",
        "up_OR, down_RI",
        "compress/test_lqlora.py::test_the_form_starts_nearer_than_its_codes_and_says_its_bytes",
    ),
    Mutation(
        "a third bit counts two",
        "serve/native/products.h",
        "high = _mm512_slli_epi16(some, 2);",
        "high = _mm512_slli_epi16(some, 1);",
        "serve/test_native.py::test_rows_longer_than_a_step_of_coarse_codes",
    ),
    Mutation(
        "the inputs of the next block come from the block as it was",
        "compress/blocks.py",
        "self._push(COMPRESSED, index, copy.deepcopy(block).float())",
        "self._push(COMPRESSED, index, copy.deepcopy(layer).float())",
        "compress/test_walk.py::test_streams_are_the_inputs_in_each_model",
    ),
    Mutation(
        "a run of other settings goes on from finished blocks",
        "compress/method.py",
        'if work.exists() and not (path.exists() and read_json(path)["plan"] == plan):',
        "if work.exists() and not path.exists():",
        "compress/test_walk.py::test_other_settings_begin_anew",
    ),
    # model: kernels of a training step
    Mutation(
        "a window of the kernels sees one key too many",
        "model/fused.py",
        "index_1T - (window - 1)",
        "index_1T - window",
        "model/test_fused.py::test_attention",
    ),
    Mutation(
        "queries' gradients are turned on instead of back",
        "model/sublayers.py",
        "native.rotate(part, cos, sin, -1.0, out=part)",
        "native.rotate(part, cos, sin, out=part)",
        "model/test_fused.py::test_a_model_has_the_same_gradients",
    ),
    Mutation(
        "the gradient that passes beside a norm is lost",
        "model/sublayers.py",
        "add=grad if needs_x else None",
        "add=None",
        "model/test_fused.py::test_a_model_has_the_same_gradients",
    ),
    Mutation(
        "keys get the gradient of one of the heads that share them",
        "model/native/attention.h",
        "for (int64_t h = g * group; h < (g + 1) * group; h++)",
        "for (int64_t h = (g + 1) * group - 1; h < (g + 1) * group; h++)",
        "model/test_fused.py::test_attention",
    ),
    Mutation(
        "the norm's eps is left out",
        "model/native/rows.h",
        "/ (float)D + eps)",
        "/ (float)D)",
        "model/test_fused.py::test_norm",
    ),
    Mutation(
        "an update's factor is forgotten in its gradient",
        "model/sublayers.py",
        "ranks] * scale if",
        "ranks] if",
        "model/test_fused.py::test_a_model_has_the_same_gradients",
    ),
    Mutation(
        "queries of a document see the one before it",
        "model/native/attention.h",
        "return between(s->first[n], (int32_t)key - (vi){0}, s->query[n]);",
        "return between((vi){0}, (int32_t)key - (vi){0}, s->query[n]);",
        "model/test_fused.py::test_attention",
    ),
    # retrieve: indexes, trainers, rerankers, readers, live indexes
    # retrieve: a walk over phrases
    Mutation(
        "the walk's matrix divided by rows instead of columns",
        "retrieve/retrievers/hipporag.py",
        "walk_PP = weight_PP @ sparse.diags(1 / np.where(degree_P > 0, degree_P, 1)) if P else weight_PP",
        "walk_PP = sparse.diags(1 / np.where(degree_P > 0, degree_P, 1)) @ weight_PP if P else weight_PP",
        "retrieve/test_hipporag.py::test_columns_of_the_walk_sum_to_one",
    ),
    Mutation(
        "specificity counts facts instead of passages",
        "retrieve/retrievers/hipporag.py",
        "(facts_AP > 0).sum(0)",
        "facts_AP.sum(0)",
        "retrieve/test_hipporag.py::test_a_passage_counts_a_phrase_once_for_each_fact",
    ),
    Mutation(
        "a phrase counts once in a passage, however many facts have it",
        "retrieve/retrievers/hipporag.py",
        "[(at, i, max(n, 1)) for i, n in counts.items()]",
        "[(at, i, 1) for i, n in counts.items()]",
        "retrieve/test_hipporag.py::test_a_passage_counts_a_phrase_once_for_each_fact",
    ),
    Mutation(
        "follow is read as the probability of starting again",
        "retrieve/retrievers/hipporag.py",
        "new = follow * (moved + (p.sum() - moved.sum()) * reset_P) + (1 - follow) * reset_P",
        "new = (1 - follow) * (moved + (p.sum() - moved.sum()) * reset_P) + follow * reset_P",
        "retrieve/test_hipporag.py::test_the_walk_is_the_solution_of_its_equation",
    ),
    Mutation(
        "the filter is applied to the k best instead of before them",
        "retrieve/search.py",
        "subset = rows if subset is None else np.intersect1d(rows, np.fromiter(subset, np.int64))",
        "subset = subset",
        "retrieve/test_filters.py::test_the_filter_leaves_room_for_every_match",
    ),
    Mutation(
        "lists take the nearest heads, whatever stands between",
        "retrieve/indexes/spann.py",
        "        covered_N = (accepted_NC[:, :c] & (rng * between_NCC[:, :c, c] <= distance_NC[:, c, None])).any(1)",
        "        covered_N = np.zeros(len(near_NC), bool)",
        "retrieve/test_spann.py::test_the_rule_spares_heads_behind_a_nearer_one",
    ),
    Mutation(
        "a vector whose lists are all full is lost",
        "retrieve/indexes/spann.py",
        "    return kept_L | (lost & last_L)",
        "    return kept_L",
        "retrieve/test_spann.py::test_every_vector_keeps_its_last_replica_when_lists_are_cut",
    ),
    Mutation(
        "the residual is taken between codes, not in the original space",
        "retrieve/indexes/_binary.py",
        "self.encode[t + 1](f_ND - read_ND)",
        "self.encode[t + 1](f_ND - b_NM)",
        "retrieve/test_bebr.py::test_a_code_made_by_hand",
    ),
    Mutation(
        "later loops weigh as much as the first",
        "retrieve/indexes/bebr.py",
        "products_N += (m - 2 * differ_N) << (2 * last - i - j)",
        "products_N += m - 2 * differ_N",
        "retrieve/test_bebr.py::test_symmetric_distance_is_the_product_of_decoded_codes",
    ),
    Mutation(
        "a pointwise loss on scores",
        "retrieve/trainers/margin_mse.py",
        "(queries_BD * (positives_BD - negatives_BD)).sum(-1)",
        "(queries_BD * positives_BD).sum(-1)",
        "retrieve/test_trainers.py::test_margin_mse_and_its_gradient_are_the_formula",
    ),
    Mutation(
        "the diagonal counts in the in-batch term",
        "retrieve/trainers/tas_balanced.py",
        "error_BP[:, :count][off_BB].mean()",
        "error_BP[:, :count].mean()",
        "retrieve/test_trainers.py::test_the_in_batch_term_is_the_double_loop_without_its_diagonal",
    ),
    Mutation(
        "bins of equal counts instead of equal widths",
        "retrieve/trainers/tas_balanced.py",
        "(bins * (margin_N - low) / (high - low)).astype(np.int64)",
        "(bins * margin_N.argsort().argsort() / len(margin_N)).astype(np.int64)",
        "retrieve/test_trainers.py::test_bins_have_equal_widths",
    ),
    Mutation(
        "clusters are drawn by their size",
        "retrieve/trainers/tas_balanced.py",
        "        for c in rng.permutation(len(self.clusters)):",
        "        for c in rng.permutation(np.repeat(np.arange(len(self.clusters)), [len(q) for q in self.clusters])):",
        "retrieve/test_trainers.py::test_the_sampler_draws_clusters_and_bins_uniformly",
    ),
    Mutation(
        "the last layer moves towards the shallow one",
        "retrieve/trainers/m_2dmse.py",
        "F.softmax(last_ND.detach() / self.config.tau, dim=-1)",
        "F.softmax(last_ND / self.config.tau, dim=-1)",
        "retrieve/test_trainers.py::test_the_divergence_does_not_move_its_target",
    ),
    Mutation(
        "one layer deeper than drawn",
        "retrieve/trainers/m_2dmse.py",
        "states.pooled(n - 1)",
        "states.pooled(n)",
        "retrieve/test_trainers.py::test_2dmse_is_the_loss_of_a_model_that_was_cut_and_run_again",
    ),
    Mutation(
        "words are summed over their occurrences",
        "retrieve/wordwise.py",
        "    return sums_NWE / tokens_NW.clamp(min=1)[..., None], tokens_NW > 0",
        "    return sums_NWE, tokens_NW > 0",
        "retrieve/test_colberter.py::test_words_are_means_over_all_their_occurrences",
    ),
    Mutation(
        "gates close words of queries too",
        "retrieve/wordwise.py",
        "        if document and self.gate is not None:",
        "        if self.gate is not None:",
        "retrieve/test_colberter.py::test_closed_words_are_neither_scored_nor_stored",
    ),
    Mutation(
        "words of any text match in exact mode",
        "retrieve/wordwise.py",
        "        match_NWV = match_NWV * (same_NWV & documents.mask_NW[:, None, :])",
        "        match_NWV = match_NWV * documents.mask_NW[:, None, :]",
        "retrieve/test_colberter.py::test_exact_matches_score_one_word_and_nothing_else",
    ),
    Mutation(
        "the pseudo-inverse of the whole matrix's rows",
        "retrieve/rerankers/cur_cross_encoder.py",
        "np.linalg.pinv(scores_QP[:, anchors_A], rcond=self.config.rcond) @ scores_QP",
        "scores_QP[:, anchors_A].T @ scores_QP / len(scores_QP)",
        "retrieve/test_rerankers.py::test_cur_is_the_naive_product_on_noise_and_not_a_least_squares_fit_on_items",
    ),
    Mutation(
        "approximated scores of anchors stand",
        "retrieve/rerankers/cur_cross_encoder.py",
        "-np.concatenate([known_A,",
        "-np.concatenate([np.zeros(len(known_A)),",
        "retrieve/test_rerankers.py::test_an_anchors_exact_score_beats_its_approximation",
    ),
    Mutation(
        "a natural logarithm in the weights of ranks",
        "retrieve/rerankers/full_ranking.py",
        "weights_T[t] = 1 + 1 / np.log2(rank + 1)",
        "weights_T[t] = 1 + 1 / np.log(rank + 1)",
        "retrieve/test_rerankers.py::test_the_loss_weighs_numbers_by_their_rank",
    ),
    Mutation(
        "the loss is divided by the weights",
        "retrieve/rerankers/full_ranking.py",
        "* weights_T).sum() / len(targets_T)",
        "* weights_T).sum() / weights_T.sum()",
        "retrieve/test_rerankers.py::test_the_loss_weighs_numbers_by_their_rank",
    ),
    Mutation(
        "missing numbers of a reply are dropped",
        "retrieve/rerankers/window.py",
        "    return order + [i for i in range(count) if i not in set(order)]",
        "    return order",
        "retrieve/test_rerankers.py::test_any_reply_gives_a_permutation",
    ),
    Mutation(
        "the second best stands in the middle",
        "retrieve/readers/long_context_rag.py",
        "i // 2 if i % 2 == 0 else count - 1 - i // 2",
        "i // 2 if i % 2 == 0 else count // 2 + i // 2 + count % 2",
        "retrieve/test_rerankers.py::test_the_best_stand_at_both_ends",
    ),
    Mutation(
        "what an addition replaces stays",
        "retrieve/live.py",
        "self._rows_of({p.id for p in fresh}).items()",
        "self._rows_of(set()).items()",
        "retrieve/test_live.py::test_a_built_folder_becomes_live_and_stays_searchable",
    ),
    Mutation(
        "an addition counts the encoder's statistics again",
        "retrieve/live.py",
        "made.count = made.fit = lambda texts: None",
        "made.count = made.count",
        "retrieve/test_live.py::test_an_encoder_keeps_its_statistics_until_a_compaction",
    ),
    Mutation(
        "equal texts serve as negatives",
        "retrieve/pairs.py",
        "ids[first_P[ids] != first_P[pairs.positive_Q[q]]][:depth]",
        "ids[ids != pairs.positive_Q[q]][:depth]",
        "retrieve/test_trainers.py::test_negatives_leave_out_the_positive_and_its_equals",
    ),
)


def picked(words: Sequence[str]) -> list[Mutation]:
    return [m for m in MUTATIONS if not words or any(w in f"{m.what} {m.file} {m.test}" for w in words)]


def copy(folder: Path) -> None:
    """The package and its tests, without what running them left behind."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def fails(folder: Path, test: str) -> bool:
    """Whether a test fails in a copy. Raises RuntimeError if it could not be run."""
    environment = os.environ | {
        "PYTHONPATH": str(folder / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),  # kernels of mutated sources go with the copy
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{test}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode < 0:  # a signal: a crash is a failure
        return True
    if done.returncode not in (0, 1):  # 1: tests ran, some failed
        raise RuntimeError(f"{test} could not be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    if " passed" not in done.stdout and done.returncode == 0 and "skipped" in done.stdout:
        raise RuntimeError(f"{test} is skipped here")
    return done.returncode == 1


def caught(folder: Path, mutation: Mutation) -> bool:
    """Plant a mutation in a copy, run its test, and take the mutation out again."""
    path = folder / "src" / "modicum" / mutation.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        raise RuntimeError(f"{mutation.file} has {source.count(mutation.old)} times: {mutation.old}")
    path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return fails(folder, mutation.test)
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(source, encoding="utf-8")


def survivors(mutations: Iterable[Mutation]) -> list[Mutation]:
    """Run them all, a line for each; those whose test passed. Raises RuntimeError if one could not be run."""
    alive = []
    with tempfile.TemporaryDirectory(prefix="modicum-mutations-") as place:
        folder = Path(place)
        copy(folder)
        sound: set[str] = set()
        for mutation in mutations:
            start = time.monotonic()
            if mutation.test not in sound and fails(folder, mutation.test):
                raise RuntimeError(f"{mutation.test} fails without any mutation")
            sound.add(mutation.test)
            killed = caught(folder, mutation)
            word = "caught" if killed else "LIVES "
            print(f"{word} {time.monotonic() - start:6.1f} s  {mutation.what} ({mutation.file})", flush=True)
            if not killed:
                alive.append(mutation)
    return alive


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="*")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    chosen = picked(given.word)
    if given.list or not chosen:
        print(*(f"{m.file}: {m.what} -> {m.test}" for m in chosen or MUTATIONS), sep="\n")
        return 0 if chosen else 2
    return 1 if survivors(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())

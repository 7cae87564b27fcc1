"""Near misses of room train."""

from near_misses import Mutation

MUTATIONS = (
    # train: distillers
    Mutation(
        "the perturbation counts only above eps",
        "train/distillers/pela.py",
        "- self.config.eps).square()",
        "- self.config.eps).clamp_min(0).square()",
        "train/test_pela.py::test_the_maximum_reaches_one_entry_of_a_matrix",
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
    # train and model: swiftkv
    Mutation(
        "later keys are of the unnormed output",
        "model/decoder.py",
        "source_BTD = self.kv_norm(x_BTD)",
        "source_BTD = x_BTD",
        "train/test_swiftkv.py::test_later_keys_are_of_one_earlier_output",
    ),
    Mutation(
        "keys of later layers are not in the cache for rows that end early",
        "serve/backends/torch.py",
        "            attend.write(layer, k_1GTE[0], v_1GTE[0])\n",
        "",
        "train/test_swiftkv.py::test_an_early_end_gives_the_logits_of_the_whole",
    ),
    Mutation(
        "rows that go on stand where the step's first rows do",
        "serve/backends/torch.py",
        "turned = model.rotations(positions_1T[:, order], x_1TD.dtype)",
        "turned = model.rotations(positions_1T[:, : len(order)], x_1TD.dtype)",
        "train/test_swiftkv.py::test_an_early_end_gives_the_logits_of_the_whole",
    ),
    Mutation(
        "the divergence lacks T^2",
        "train/distillers/_teacher.py",
        "return temperature**2 * (t_NV.exp() * (t_NV - s_NV)).sum(-1)",
        "return (t_NV.exp() * (t_NV - s_NV)).sum(-1)",
        "train/test_swiftkv.py::test_the_loss_is_numpys",
    ),
    # train and model: sub-models
    Mutation(
        "a group of keys goes without its further query heads",
        "model/submodel.py",
        "queries = keys * (shape.heads // shape.kv_heads)",
        "queries = keys",
        "train/test_sortednet.py::test_a_sub_model_is_a_separately_built_one",
    ),
    Mutation(
        "down's columns stay where they were when channels are sorted",
        "model/submodel.py",
        "_permute(ins, [mlp.down], score_F",
        "_permute(ins, [], score_F",
        "train/test_sortednet.py::test_sorting_changes_no_output_and_puts_what_matters_first",
    ),
    Mutation(
        "every micro-batch of a run draws the same sub-model",
        "train/objectives/sortednet.py",
        'Random(f"{step.seed}/{step.index}/{step.micro}/{step.rank}")',
        'Random(f"{step.seed}")',
        "train/test_sortednet.py::test_the_step_decides_the_draw",
    ),
    Mutation(
        "the average takes most of the new weights",
        "train/distillers/poa.py",
        "average.lerp_(p.to(average.dtype), 1 - self.config.momentum)",
        "average.lerp_(p.to(average.dtype), self.config.momentum)",
        "train/test_sortednet.py::test_the_teacher_is_an_exponential_average",
    ),
    Mutation(
        "the elastic student learns from the teacher alone",
        "train/distillers/poa.py",
        " + divergence(student, small_BTD, same_BTD)",
        "",
        "train/test_sortednet.py::test_the_loss_is_the_sum_of_three_divergences",
    ),
)

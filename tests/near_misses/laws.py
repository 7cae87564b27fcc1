"""Near misses of room laws."""

from near_misses import Mutation

MUTATIONS = (
    Mutation(
        "a time buys more FLOPs per second from a larger model",
        "laws/plan.py",
        "* np.maximum(size_N / self.largest, 1)",
        "",
        "laws/test_plan.py::test_a_time_buys_tokens_at_the_measured_rate",
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
    # laws: experiments
    Mutation(
        "the predictor is refitted on the last round alone",
        "laws/experiments/climb.py",
        'known = [r for r in runs if int(r.trial.name.split("-")[1]) < begin]',
        'known = [r for r in runs if int(r.trial.name.split("-")[1]) >= begin - self.config.rounds[number - 1]]',
        "laws/test_experiments.py::test_climb_fits_all_rounds_and_leaves_out_what_a_run_cannot_afford",
    ),
    Mutation(
        "the predicted mixture is always taken",
        "laws/experiments/climb.py",
        "losses[least] + errors[least] < seen.predicted",
        "losses[least] - errors[least] < seen.predicted",
        "laws/test_experiments.py::test_climb_takes_the_predicted_mixture_only_if_better_by_more_than_its_error",
    ),
    Mutation(
        "the start of a run, where the rate warms up, counts",
        "laws/experiments/cmr.py",
        "if tokens > self.config.settle * curve[-1][0]:",
        "if tokens > 0:",
        "laws/test_experiments.py::test_cmr_leaves_out_the_beginning_of_each_run",
    ),
    Mutation(
        "projektor reads the law's sources as if they were in the domains' order",
        "laws/experiments/projektor.py",
        "best = law.select(fit, sorted_distance, tokens)[order]",
        "best = law.select(fit, sorted_distance, tokens)",
        "laws/test_experiments.py::test_projektor_descends_to_the_mixture_of_a_known_surface",
    ),
    Mutation(
        "effects are not paired by seed",
        "laws/experiments/pretrainers_guide.py",
        "difference = loss_ASG[1:] - loss_ASG[:1]",
        "difference = loss_ASG[1:] - loss_ASG[:1].mean(1, keepdims=True)",
        "laws/test_experiments.py::test_effects_are_paired_by_seed_and_their_intervals_pooled",
    ),
    Mutation(
        "a year's own difficulty counts as decay",
        "laws/experiments/pretrainers_guide.py",
        "y += [*(loss_CY[at, j] - loss_CY[at, j].mean())]",
        "y += [*loss_CY[at, j]]",
        "laws/test_experiments.py::test_temporal_decay_is_the_slope_within_years",
    ),
)

"""Near misses of room compress."""

from near_misses import Mutation

MUTATIONS = (
    # compress and model: perp
    Mutation(
        "the reconstruction's gradient fills the zeros",
        "compress/compressors/perp.py",
        "slope_OI = (through_OI * (2 * scaling / first)).masked_fill_(~live_OI, 0)",
        "slope_OI = through_OI * (2 * scaling / first)",
        "compress/test_perp.py::test_steps_are_those_of_autograd",
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
)

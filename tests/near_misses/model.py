"""Near misses of room model."""

from near_misses import Mutation

MUTATIONS = (
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
    Mutation(
        "the rank is a ratio of the full rank instead of the numbers",
        "model/linear/lowrank.py",
        "int(inputs * outputs / (ratio * (inputs + outputs)))",
        "int(min(inputs, outputs) / ratio)",
        "train/test_pela.py::test_factors_are_the_truncated_svd",
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
        "the embedding draws numbers that nobody reads",
        "model/decoder.py",
        "return nn.Embedding(rows, width, _weight=torch.empty(rows, width))",
        "return nn.Embedding(rows, width)",
        "serve/test_start.py::test_chat_and_serve_import_nothing_they_do_not_need",
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
)

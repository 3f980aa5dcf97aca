"""The words of graphs: the part of the contract that `graph.proto` cannot say.

A client writes only these, a server runs only these. Every tensor operator on the list
is pure: it writes to none of its arguments, reads no file, draws no random number and
returns no uninitialised memory.
"""

from __future__ import annotations

import re

VERSION = 1
MAX_GRAPH_BYTES = 2 << 20
"""Of a serialised graph, so that it fits the header message."""
MAX_NODES = 50_000
MAX_LIST = 4_096
"""Items of one list argument, inputs, and outputs."""
MAX_NAME = 512
"""Characters of a name, a word or a place in the source."""
MAX_INLINE_BYTES = 64 << 10
"""Of the constants that travel inside a loss."""

TENSOR_OPERATORS = frozenset(
    """
    _adaptive_avg_pool2d _conj _fft_c2c _fft_c2r _fft_r2c _linalg_det _linalg_eigh
    _linalg_slogdet _linalg_solve_ex _linalg_svd _log_softmax _softmax _to_copy
    _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d abs
    acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d add addbmm addcdiv addcmul addmm addmv alias
    all amax amin aminmax angle any arange argmax argmin argsort asin asinh atan atan2
    atanh avg_pool1d avg_pool2d avg_pool2d_backward avg_pool3d baddbmm batch_norm
    bilinear binary_cross_entropy binary_cross_entropy_with_logits bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm
    broadcast_tensors bucketize cat cdist ceil celu channel_shuffle cholesky_solve chunk
    clamp clamp_max clamp_min clone col2im complex concat conj_physical constant_pad_nd
    contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    convolution convolution_backward copy copysign cos cosh cosine_embedding_loss
    cosine_similarity cross cross_entropy_loss cummax cummin cumprod cumsum deg2rad
    detach diag diag_embed diagonal diagonal_scatter diff digamma div dot einsum elu
    embedding eq erf erfc erfinv exp exp2 expand expand_as expm1 eye fft_fftfreq
    fft_rfftfreq fill flatten flip floor floor_divide fmax fmin fmod frac full full_like
    gather ge gelu glu group_norm gru gt hamming_window hann_window hardshrink
    hardsigmoid hardswish hardtanh heaviside hinge_embedding_loss hypot i0 im2col index
    index_add index_copy index_fill index_put index_select inner instance_norm isfinite
    isin isinf isnan kl_div kron kthvalue l1_loss layer_norm le leaky_relu lerp lgamma
    linalg_cholesky_ex linalg_cross linalg_householder_product linalg_inv_ex linalg_lu
    linalg_lu_factor_ex linalg_matrix_exp linalg_pinv linalg_qr linalg_solve_triangular
    linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax
    logaddexp logaddexp2 logcumsumexp logical_and logical_not logical_or logical_xor
    logit logspace logsumexp lstm lt lu_unpack mT margin_ranking_loss masked_fill
    masked_scatter matmul max max_pool1d max_pool2d max_pool2d_with_indices
    max_pool2d_with_indices_backward max_pool3d max_pool3d_with_indices max_unpool2d
    max_unpool3d maximum mean median meshgrid min minimum mish mm mode movedim mse_loss
    mul multi_margin_loss multilabel_margin_loss mv mvlgamma nan_to_num nanmedian nansum
    narrow native_group_norm native_layer_norm ne neg new_full new_ones new_zeros
    nll_loss nll_loss2d nll_loss_nd norm numpy_T one_hot ones ones_like outer pad
    pairwise_distance permute pixel_shuffle pixel_unshuffle poisson_nll_loss polar
    polygamma pow prelu prod rad2deg reciprocal relu relu6 remainder repeat
    repeat_interleave reshape reshape_as resolve_conj resolve_neg rms_norm rnn_relu
    rnn_tanh roll rot90 round rsqrt rsub scalar_tensor scaled_dot_product_attention
    scatter scatter_add scatter_reduce searchsorted select select_scatter selu sgn
    sigmoid sign silu sin sinc sinh slice slice_scatter smooth_l1_loss soft_margin_loss
    softmax softplus softshrink sort special_entr special_erfcx special_i0e special_i1
    special_i1e special_log_ndtr special_ndtri special_xlog1py special_zeta split
    split_with_sizes sqrt square squeeze stack std std_mean sub sum swapaxes swapdims t
    take take_along_dim tan tanh tensor_split threshold tile to topk trace transpose
    tril tril_indices triplet_margin_loss triu triu_indices trunc type_as unbind
    unflatten unfold unsqueeze upsample_bicubic2d upsample_bilinear2d
    upsample_bilinear2d_backward upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest2d_backward upsample_trilinear3d var var_mean vdot view_as
    view_as_complex view_as_real where xlogy zeros zeros_like
    """.split()
)
"""Names in aten; of each every overload whose schema is as pure."""

SIZE_OPERATORS = frozenset(
    """
    size numel item add sub mul floordiv mod truediv neg min max int float eq ne lt le gt ge
    and or not
    """.split()
)
"""On sizes, and on the sequences that some operators return."""

WORDS = frozenset(
    """
    none mean sum tanh trunc floor ij xy constant reflect replicate circular prod amax
    amin left right L U reduced complete r
    """.split()
)
"""Texts that operators take, beside equations."""

EQUATION = re.compile(r"[A-Za-z .,]{0,200}(->[A-Za-z .]{0,60})?")
OPERATOR = re.compile(r"(aten)\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z][A-Za-z0-9_]*)")
SIZE_OPERATOR = re.compile(r"sym\.([a-z]+)")

FLOATING = ("F16", "BF16", "F32", "F64")
ELEMENT_TYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", *FLOATING)
COMPLEX = {"F16": "C64", "BF16": "C64", "F32": "C64", "F64": "C128"}
"""Types of intermediate values only: what numbers of a type become when they turn
complex. Inputs, tensors and outputs are real."""
MEMORY_FORMATS = ("contiguous", "preserve", "channels_last", "channels_last_3d")


def is_allowed(operator: str) -> bool:
    """Tell whether a server may know an operator.

    Args:
        operator: As in ``GraphNode.operator``.

    Returns:
        Whether its name is on the list; its overload is not looked at.
    """
    tensor, size = OPERATOR.fullmatch(operator), SIZE_OPERATOR.fullmatch(operator)
    if tensor is not None:
        return tensor[2] in TENSOR_OPERATORS
    return size is not None and size[1] in SIZE_OPERATORS

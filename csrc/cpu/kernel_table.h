// The kernel table of the instruction set SBF_ISA. Included once by each kernels_<isa>.cpp, which
// the build compiles with the flags of that instruction set.
#pragma once

#include "activation_backward_kernel.h"
#include "attention_backward_kernel.h"
#include "attention_kernel.h"
#include "gated_kernel.h"
#include "gelu_kernel.h"
#include "linear_kernel.h"
#include "linear_norm_kernel.h"
#include "norm_backward_kernel.h"
#include "norm_kernels.h"
#include "pool_kernel.h"
#include "quantize_kernel.h"
#if defined(SBF_TILES)
#include "tile_attention.h"
#include "tile_linear_norm.h"
#endif

#define SBF_STRINGIZE(name) #name
#define SBF_NAME(isa) SBF_STRINGIZE(isa)

namespace sbert_fast::cpu::SBF_ISA {

// The linear layers of T, bf16 or int8_t, which tiles compute where there are some.
template <class T>
struct NarrowLinear {
#if defined(SBF_TILES)
  static constexpr RangeKernel<LinearParams> kToFloat = tile_linear<T, float>;
  static constexpr RangeKernel<LinearParams> kToBf16 = tile_linear<T, bf16>;
  static constexpr LinearItems kItems = kTileItems;
#else
  static constexpr RangeKernel<LinearParams> kToFloat = linear<T, float>;
  static constexpr RangeKernel<LinearParams> kToBf16 = linear<T, bf16>;
  static constexpr LinearItems kItems = kLinearItems;
#endif
};

#if defined(SBF_TILES)
constexpr RangeKernel<LinearNormParams> kLinearNormBf16 = tile_linear_norm;
constexpr RangeKernel<AttentionParams> kAttentionBf16 = tile_attention;
constexpr RangeKernel<SplitParams> kSplitRows = split_rows;
constexpr RangeKernel<LinearParams> kLinearSplit = tile_linear<SplitFloat, float>;
constexpr RangeKernel<LinearNormParams> kLinearNormSplit =
    linear_norm<SplitFloat, float, kLinearSplit>;
#else
constexpr RangeKernel<LinearNormParams> kLinearNormBf16 = linear_norm<bf16>;
constexpr RangeKernel<AttentionParams> kAttentionBf16 = varlen_attention<bf16>;
constexpr RangeKernel<SplitParams> kSplitRows = nullptr;
constexpr RangeKernel<LinearParams> kLinearSplit = nullptr;
constexpr RangeKernel<LinearNormParams> kLinearNormSplit = nullptr;
#endif

// Constant-initialised: loading the library must run no instruction of a foreign set.
constexpr KernelTable kTable{
    .isa = SBF_NAME(SBF_ISA),
    .varlen_attention = {varlen_attention<float>, kAttentionBf16},
    .attention_backward = {attention_backward<float>, attention_backward<bf16>},
    .attention_backward_scratch = HeadGradient<float>::scratch_size,
    .add_norm_backward = {add_norm_backward<float>, add_norm_backward<bf16>},
    .embed_norm = {{embed_norm<float, float>, embed_norm<float, bf16>},
                   {nullptr, embed_norm<bf16, bf16>}},
    .add_norm = {{add_norm<float, float>, add_norm<float, bf16>}, {nullptr, add_norm<bf16, bf16>}},
    .bias_gelu = {bias_gelu<float>, bias_gelu<bf16>},
    .gelu_backward = {bias_gelu_backward<float>, bias_gelu_backward<bf16>},
    .gated_activation = {gated_activation<float>, gated_activation<bf16>},
    .gated_backward = {gated_activation_backward<float>, gated_activation_backward<bf16>},
    .linear = {{linear<float, float>, nullptr},
               {NarrowLinear<bf16>::kToFloat, NarrowLinear<bf16>::kToBf16}},
    .linear_norm = {linear_norm<float>, kLinearNormBf16},
    .quantize_rows = {quantize_rows<float>, quantize_rows<bf16>},
    .linear_int8 = {NarrowLinear<int8_t>::kToFloat, NarrowLinear<int8_t>::kToBf16},
    .linear_norm_int8 = {linear_norm<int8_t, float, NarrowLinear<int8_t>::kToFloat>,
                         linear_norm<int8_t, bf16, NarrowLinear<int8_t>::kToFloat>},
    .split_rows = kSplitRows,
    .linear_split = kLinearSplit,
    .linear_norm_split = kLinearNormSplit,
    .segment_pool = {segment_pool<float>, segment_pool<bf16>},
    .linear_items = {kLinearItems, NarrowLinear<bf16>::kItems},
};

const KernelTable& kernel_table() { return kTable; }

}  // namespace sbert_fast::cpu::SBF_ISA

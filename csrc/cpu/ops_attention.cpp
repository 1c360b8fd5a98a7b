// API layer of varlen_attention.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "ops.h"
#include "parallel.h"
#include "value_checks.h"

namespace sbert_fast::cpu {
namespace {

constexpr const char* op = "varlen_attention";

void check_optional_inputs(int64_t T, int64_t H, int64_t D, const std::optional<Tensor>& bias,
                           int64_t window, const std::optional<Tensor>& rotary_cos,
                           const std::optional<Tensor>& rotary_sin,
                           const std::optional<Tensor>& tiles) {
  check_tensor(op, "bias", bias, ScalarType::Float, "[H, 2R + 1]", {H, kAnySize});
  SBF_CHECK(!bias.has_value() || bias->size(1) % 2 == 1, op,
            "bias must be [H, 2R + 1] with an odd number of columns, got ", describe(*bias));
  SBF_CHECK(window >= -1, op, "window must be at least -1, got ", window);
  SBF_CHECK(rotary_cos.has_value() == rotary_sin.has_value(), op,
            "rotary_cos and rotary_sin must both be given or both be None, got only ",
            rotary_cos.has_value() ? "rotary_cos" : "rotary_sin");
  SBF_CHECK(!rotary_cos.has_value() || D % 2 == 0, op, "D must be even with rotary, got ", D);
  check_tensor(op, "rotary_cos", rotary_cos, ScalarType::Float, "[T, D / 2]", {T, D / 2});
  check_tensor(op, "rotary_sin", rotary_sin, ScalarType::Float, "[T, D / 2]", {T, D / 2});
  check_tensor(op, "tiles", tiles, ScalarType::Int, "[n, 4]", {kAnySize, 4});
}

struct Heads {
  Dtype dtype;
  int64_t queries, keys, D;
};

/// Heads of queries and of keys: as many in [T, 3, H, D], fewer in [T, H + 2 * kv_heads, D].
Heads check_heads(const Tensor& qkv, int64_t kv_heads) {
  if (kv_heads == 0) {
    const Dtype dtype =
        check_activation(op, "qkv", qkv, "[T, 3, H, D]", {kAnySize, 3, kAnySize, kAnySize});
    return {dtype, qkv.size(2), qkv.size(2), qkv.size(3)};
  }
  const Dtype dtype =
      check_activation(op, "qkv", qkv, "[T, H + 2 * kv_heads, D]", {kAnySize, kAnySize, kAnySize});
  const int64_t queries = qkv.size(1) - 2 * kv_heads;
  SBF_CHECK(kv_heads > 0 && queries > 0 && queries % kv_heads == 0, op,
            "kv_heads must divide the heads H of qkv [T, H + 2 * kv_heads, D], got ", kv_heads,
            " and ", describe(qkv));
  return {dtype, queries, kv_heads, qkv.size(2)};
}

/// The rows P of the tables of distances [H, P, D]; 0 where there are none.
int64_t check_distances(const Tensor& qkv, const Heads& heads,
                        const std::optional<Tensor>& position_keys,
                        const std::optional<Tensor>& position_queries,
                        const std::optional<Tensor>& buckets) {
  const bool some = position_keys.has_value() || position_queries.has_value();
  SBF_CHECK(some == buckets.has_value(), op,
            "buckets must be given with position_keys, position_queries or both, got ",
            some ? "no buckets" : "buckets alone");
  if (!some) return 0;
  int64_t P = kAnySize;
  const auto check = [&](const char* name, const std::optional<Tensor>& table) {
    check_tensor(op, name, table, qkv.scalar_type(), "[H, P, D]", {heads.queries, P, heads.D});
    if (table.has_value()) P = table->size(1);
  };
  check("position_keys", position_keys);
  check("position_queries", position_queries);
  check_tensor(op, "buckets", buckets, ScalarType::Int, "[2R + 1]", {kAnySize});
  SBF_CHECK(buckets->size(0) % 2 == 1, op, "buckets must be [2R + 1], an odd number, got ",
            describe(*buckets));
  check_indices(op, "buckets", buckets->const_data_ptr<int32_t>(), buckets->size(0), P,
                "the tables");
  return P;
}

}  // namespace

Tensor varlen_attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                        double scale, const std::optional<Tensor>& bias, int64_t window,
                        const std::optional<Tensor>& rotary_cos,
                        const std::optional<Tensor>& rotary_sin, const std::optional<Tensor>& tiles,
                        bool causal, int64_t kv_heads, const std::optional<Tensor>& query_norm,
                        const std::optional<Tensor>& key_norm, double norm_eps,
                        const std::optional<Tensor>& position_keys,
                        const std::optional<Tensor>& position_queries,
                        const std::optional<Tensor>& buckets) {
  const Heads heads = check_heads(qkv, kv_heads);
  const int64_t T = qkv.size(0), H = heads.queries, D = heads.D;
  SBF_CHECK(kMinHeadDim <= D && D <= kMaxHeadDim, op, "D must be in [", kMinHeadDim, ", ",
            kMaxHeadDim, "], got ", D);
  check_optional_inputs(T, H, D, bias, window, rotary_cos, rotary_sin, tiles);
  check_tensor(op, "query_norm", query_norm, ScalarType::Float, "[D]", {D});
  check_tensor(op, "key_norm", key_norm, ScalarType::Float, "[D]", {D});
  SBF_CHECK(query_norm.has_value() == key_norm.has_value(), op,
            "query_norm and key_norm must both be given or both be None, got only ",
            query_norm.has_value() ? "query_norm" : "key_norm");
  const int64_t P = check_distances(qkv, heads, position_keys, position_queries, buckets);
  const Sequences sequences = check_cu_seqlens(op, cu_seqlens, T);
  const int32_t* cu = sequences.cu;
  const int64_t B = sequences.B;
  SBF_CHECK(sequences.longest <= max_seqlen, op, "max_seqlen must be at least ", sequences.longest,
            ", the longest sequence, got ", max_seqlen);

  Tensor out = new_output({T, H, D}, heads.dtype);
  const AttentionParams params{
      .qkv = qkv.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .cu_seqlens = cu,
      .T = T,
      .B = B,
      .H = H,
      .D = D,
      .kv_heads = heads.keys,
      .scale = static_cast<float>(scale),
      .causal = causal,
      .bias = data_or_null<float>(bias),
      .R = bias.has_value() ? bias->size(1) / 2 : 0,
      .window = std::min(window, T),
      .rotary_cos = data_or_null<float>(rotary_cos),
      .rotary_sin = data_or_null<float>(rotary_sin),
      .query_norm = data_or_null<float>(query_norm),
      .key_norm = data_or_null<float>(key_norm),
      .norm_eps = static_cast<float>(norm_eps),
      .position_keys = data_or_null<void>(position_keys),
      .position_queries = data_or_null<void>(position_queries),
      .buckets = data_or_null<int32_t>(buckets),
      .P = P,
      .reach = buckets.has_value() ? buckets->size(0) / 2 : 0,
  };
  if (cu[B] < T) {
    const size_t row_bytes = static_cast<size_t>(H * D) * out.element_size();
    std::memset(static_cast<char*>(params.out) + cu[B] * row_bytes, 0, (T - cu[B]) * row_bytes);
  }
  const auto items = [&](int64_t sequence) {
    const int64_t length = cu[sequence + 1] - cu[sequence];
    const int64_t keys = window < 0 ? length : std::min(length, 2 * params.window + 1);
    return ItemGroup{.items = H, .cost = length * ((causal ? keys / 2 : keys) + 16) * D / 16};
  };
  parallel_items(kernels().varlen_attention[heads.dtype], params, B, items);
  return out;
}

}  // namespace sbert_fast::cpu

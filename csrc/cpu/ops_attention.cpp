// API layer of varlen_attention.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "ops.h"
#include "parallel.h"
#include "value_checks.h"

namespace sbert_fast::cpu {
namespace {

struct Heads {
  Dtype dtype;
  int64_t queries, keys, D;
};

/// Heads of queries and of keys: as many in [T, 3, H, D], fewer in [T, H + 2 * kv_heads, D].
Heads check_heads(const char* op, const Tensor& qkv, int64_t kv_heads) {
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
int64_t check_distances(const char* op, const Tensor& qkv, int64_t H, int64_t D,
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
    check_tensor(op, name, table, qkv.scalar_type(), "[H, P, D]", {H, P, D});
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

Dropout dropout_of(const char* op, double rate, const std::optional<Tensor>& seed) {
  SBF_CHECK(rate >= 0.0 && rate < 1.0, op, "dropout must be in [0, 1), got ", rate);
  check_tensor(op, "seed", seed, ScalarType::Long, "[1]", {1});
  if (rate == 0.0) return {};
  SBF_CHECK(seed.has_value(), op, "seed must be given with dropout, got None");
  return {static_cast<uint32_t>(rate * 4294967296.0), static_cast<float>(1.0 / (1.0 - rate)),
          static_cast<uint64_t>(*seed->const_data_ptr<int64_t>())};
}

CheckedAttention check_attention(const char* op, const Tensor& qkv, const Tensor& cu_seqlens,
                                 int64_t max_seqlen, double scale,
                                 const std::optional<Tensor>& bias, int64_t window,
                                 const std::optional<Tensor>& rotary_cos,
                                 const std::optional<Tensor>& rotary_sin, bool causal,
                                 int64_t kv_heads, const std::optional<Tensor>& query_norm,
                                 const std::optional<Tensor>& key_norm, double norm_eps,
                                 double dropout, const std::optional<Tensor>& seed) {
  const Heads heads = check_heads(op, qkv, kv_heads);
  const int64_t T = qkv.size(0), H = heads.queries, D = heads.D;
  SBF_CHECK(kMinHeadDim <= D && D <= kMaxHeadDim, op, "D must be in [", kMinHeadDim, ", ",
            kMaxHeadDim, "], got ", D);
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
  check_tensor(op, "query_norm", query_norm, ScalarType::Float, "[D]", {D});
  check_tensor(op, "key_norm", key_norm, ScalarType::Float, "[D]", {D});
  SBF_CHECK(query_norm.has_value() == key_norm.has_value(), op,
            "query_norm and key_norm must both be given or both be None, got only ",
            query_norm.has_value() ? "query_norm" : "key_norm");
  const auto [cu, B, longest] = check_cu_seqlens(op, cu_seqlens, T);
  SBF_CHECK(longest <= max_seqlen, op, "max_seqlen must be at least ", longest,
            ", the longest sequence, got ", max_seqlen);

  AttentionParams params{};
  params.qkv = qkv.const_data_ptr();
  params.cu_seqlens = cu;
  params.T = T;
  params.B = B;
  params.H = H;
  params.D = D;
  params.kv_heads = heads.keys;
  params.scale = static_cast<float>(scale);
  params.causal = causal;
  params.bias = data_or_null<float>(bias);
  params.R = bias.has_value() ? bias->size(1) / 2 : 0;
  params.window = std::min(window, T);
  params.rotary_cos = data_or_null<float>(rotary_cos);
  params.rotary_sin = data_or_null<float>(rotary_sin);
  params.query_norm = data_or_null<float>(query_norm);
  params.key_norm = data_or_null<float>(key_norm);
  params.norm_eps = static_cast<float>(norm_eps);
  params.dropout = dropout_of(op, dropout, seed);
  return {params, heads.dtype, longest};
}

Tensor varlen_attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                        double scale, const std::optional<Tensor>& bias, int64_t window,
                        const std::optional<Tensor>& rotary_cos,
                        const std::optional<Tensor>& rotary_sin, const std::optional<Tensor>& tiles,
                        bool causal, int64_t kv_heads, const std::optional<Tensor>& query_norm,
                        const std::optional<Tensor>& key_norm, double norm_eps,
                        const std::optional<Tensor>& position_keys,
                        const std::optional<Tensor>& position_queries,
                        const std::optional<Tensor>& buckets, double dropout,
                        const std::optional<Tensor>& seed) {
  constexpr const char* op = "varlen_attention";
  auto [params, dtype, longest] =
      check_attention(op, qkv, cu_seqlens, max_seqlen, scale, bias, window, rotary_cos, rotary_sin,
                      causal, kv_heads, query_norm, key_norm, norm_eps, dropout, seed);
  const int64_t T = params.T, H = params.H, D = params.D, last = params.cu_seqlens[params.B];
  check_tensor(op, "tiles", tiles, ScalarType::Int, "[n, 4]", {kAnySize, 4});
  params.position_keys = data_or_null<void>(position_keys);
  params.position_queries = data_or_null<void>(position_queries);
  params.buckets = data_or_null<int32_t>(buckets);
  params.P = check_distances(op, qkv, H, D, position_keys, position_queries, buckets);
  params.reach = buckets.has_value() ? buckets->size(0) / 2 : 0;

  Tensor out = new_output({T, H, D}, dtype);
  params.out = out.mutable_data_ptr();
  if (last < T) {
    const size_t row_bytes = static_cast<size_t>(H * D) * out.element_size();
    std::memset(static_cast<char*>(params.out) + last * row_bytes, 0, (T - last) * row_bytes);
  }
  const auto items = [&params = params](int64_t sequence) {
    const int64_t length = params.cu_seqlens[sequence + 1] - params.cu_seqlens[sequence];
    const int64_t keys = params.window < 0 ? length : std::min(length, 2 * params.window + 1);
    const int64_t seen = (params.causal ? keys / 2 : keys) + 16;
    return ItemGroup{.items = params.H, .cost = length * seen * params.D / 16};
  };
  parallel_items(kernels().varlen_attention[dtype], params, params.B, items);
  return out;
}

}  // namespace sbert_fast::cpu

// SPDX-License-Identifier: Apache-2.0
// The conformance cases of the ONNX Attention operator (opsets 23 and 24): output Y of the oracle and of attention().
//
// What the operator means in terms of attention_options: past keys and values come before the new ones and set the
// causal offset; nonpad_kv_seqlen is kv_lengths, with the queries at the end of what is valid; else the causal edge is
// top-left (offset 0). A boolean attn_mask is a mask, any other a bias; keys beyond its end are hidden.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <regex>
#include <string>
#include <vector>

#include <gqa/gqa.hpp>

#include "support/kernels.hpp"
#include "support/matchers.hpp"
#include "support/oracle.hpp"
#include "support/test_data.hpp"

namespace gqa::test {
namespace {

// A .npy file, its values widened.
struct array {
  std::string type;  // numpy's name: f4, f2, b1, i8
  std::vector<index_t> shape;
  std::vector<double> values;

  [[nodiscard]] bool empty() const { return type.empty(); }
};

template <class T>
void widen(const char* bytes, std::vector<double>& values) {
  for (double& value : values) {
    T element;
    std::memcpy(&element, bytes, sizeof element);
    value = static_cast<double>(element);
    bytes += sizeof element;
  }
}

array read_npy(const std::filesystem::path& path) {
  array a;
  if (!std::filesystem::exists(path)) return a;
  const std::string file = read_file(path.string());
  constexpr std::size_t preamble = 10;  // magic, version 1.0, 16-bit header length
  const std::size_t header_length = static_cast<unsigned char>(file.at(8)) + 256u * static_cast<unsigned char>(file[9]);
  const std::string header = file.substr(preamble, header_length);
  std::smatch found;
  const std::regex fields(R"('descr': '[<|](\w\d)', 'fortran_order': False, 'shape': \(([^)]*)\))");
  if (!std::regex_search(header, found, fields)) {
    ADD_FAILURE() << "unexpected header in " << path;
    return a;
  }
  a.type = found[1];
  const std::string extents = found[2];
  const std::regex integer("[0-9]+");
  std::size_t size = 1;
  for (std::sregex_iterator i(extents.begin(), extents.end(), integer), none; i != none; ++i) {
    a.shape.push_back(std::stol(i->str()));
    size *= static_cast<std::size_t>(a.shape.back());
  }
  a.values.resize(size);
  const char* const bytes = file.data() + preamble + header_length;
  if (a.type == "f4") widen<float>(bytes, a.values);
  if (a.type == "f2") widen<Eigen::half>(bytes, a.values);
  if (a.type == "i8") widen<std::int64_t>(bytes, a.values);
  if (a.type == "b1") widen<bool>(bytes, a.values);
  return a;
}

// [B, heads, S, D] as stored in rank 4, [B, S, heads * D] in rank 3; here dense [B, S, heads, D].
struct operand {
  std::array<index_t, 4> extents{};
  std::vector<double> values;

  operand() = default;
  operand(const array& a, index_t heads) {
    const bool rank4 = a.shape.size() == 4;
    const index_t b_len = a.shape[0], s_len = rank4 ? a.shape[2] : a.shape[1];
    heads = rank4 ? a.shape[1] : heads;
    const index_t dim = rank4 ? a.shape[3] : a.shape[2] / heads;
    extents = {b_len, s_len, heads, dim};
    if (!rank4) {
      values = a.values;
      return;
    }
    const tensor_view<const double, 4> stored(a.values.data(), extents,
                                              {heads * s_len * dim, dim, s_len * dim, index_t{1}});
    values.reserve(a.values.size());
    for (index_t b = 0; b < b_len; ++b)
      for (index_t s = 0; s < s_len; ++s)
        for (index_t h = 0; h < heads; ++h)
          for (index_t d = 0; d < dim; ++d) values.push_back(stored(b, s, h, d));
  }

  // past, then *this.
  void prepend(const operand& past) {
    const auto [b_len, past_len, heads, dim] = past.extents;
    const auto token = static_cast<std::size_t>(heads * dim);
    std::vector<double> both;
    for (index_t b = 0; b < b_len; ++b) {
      const auto rows = [&](const operand& x) {
        const std::size_t n = static_cast<std::size_t>(x.extents[1]) * token;
        both.insert(both.end(), x.values.begin() + b * static_cast<index_t>(n),
                    x.values.begin() + (b + 1) * static_cast<index_t>(n));
      };
      rows(past);
      rows(*this);
    }
    extents[1] += past_len;
    values = std::move(both);
  }

  template <class T>
  [[nodiscard]] std::vector<T> as() const {
    std::vector<T> narrow;
    for (const double x : values) narrow.push_back(static_cast<T>(x));
    return narrow;
  }
};

// One case: operands, options, and the memory that the options point to.
struct onnx_case {
  std::string name, type;
  operand q, k, v, y;
  attention_options options;
  std::vector<index_t> lengths, offsets;
  std::unique_ptr<bool[]> mask;
  std::vector<float> bias;

  explicit onnx_case(const std::filesystem::path& folder) : name(folder.filename().string()) {
    const std::string json = read_file((folder / "case.json").string());
    const auto integer = [&](const char* key) { return static_cast<index_t>(json_number(json, key).value_or(0)); };
    const array stored_q = read_npy(folder / "Q.npy");
    const index_t q_heads = integer("q_num_heads"), kv_heads = integer("kv_num_heads");
    type = stored_q.type;
    q = operand(stored_q, q_heads);
    k = operand(read_npy(folder / "K.npy"), kv_heads);
    v = operand(read_npy(folder / "V.npy"), kv_heads);
    y = operand(read_npy(folder / "Y.npy"), q_heads);
    index_t past = 0;
    if (const array past_key = read_npy(folder / "past_key.npy"); !past_key.empty()) {
      past = past_key.shape[2];
      k.prepend(operand(past_key, kv_heads));
      v.prepend(operand(read_npy(folder / "past_value.npy"), kv_heads));
    }
    options.causal = integer("is_causal") != 0;
    options.scale = json_number(json, "scale");
    options.softcap = json_number(json, "softcap").value_or(0);
    if (const array valid = read_npy(folder / "nonpad_kv_seqlen.npy"); !valid.empty()) {
      for (const double n : valid.values) {
        lengths.push_back(static_cast<index_t>(n));
        offsets.push_back(lengths.back() - q.extents[1]);
      }
      options.kv_lengths = lengths;
      options.query_offsets = offsets;
    } else {
      options.query_offset = past;
    }
    if (const array stored = read_npy(folder / "attn_mask.npy"); !stored.empty()) take_mask(stored);
  }

  // [S, T], or [B|1, H|1, S, T] with leading axes left out, to [B, H, S, T].
  void take_mask(const array& stored) {
    std::array<index_t, 4> from{1, 1, 1, 1};
    std::copy(stored.shape.rbegin(), stored.shape.rend(), from.rbegin());
    const std::array<index_t, 4> to{q.extents[0], q.extents[2], q.extents[1], k.extents[1]};
    const tensor_view<const double, 4> given(stored.values.data(), from);
    const auto size = static_cast<std::size_t>(to[0] * to[1] * to[2] * to[3]);
    const bool boolean = stored.type == "b1";
    mask = std::make_unique<bool[]>(size);
    bias.resize(size);
    std::size_t i = 0;
    for (index_t b = 0; b < to[0]; ++b)
      for (index_t h = 0; h < to[1]; ++h)
        for (index_t s = 0; s < to[2]; ++s)
          for (index_t t = 0; t < to[3]; ++t, ++i) {
            const bool there = t < from[3];
            const double value = there ? given(from[0] == 1 ? 0 : b, from[1] == 1 ? 0 : h, from[2] == 1 ? 0 : s, t) : 0;
            mask[i] = there && value != 0;
            bias[i] = there ? static_cast<float>(value) : -std::numeric_limits<float>::infinity();
          }
    if (boolean) options.mask = tensor_view<const bool, 4>(mask.get(), to);
    if (!boolean) options.bias = tensor_view<const float, 4>(bias.data(), to);
  }

  // Runs `attend(q, k, v, out, options)` on elements of type T and compares with Y.
  template <class T, class Attend>
  [[nodiscard]] comparison compare(const Attend& attend) const {
    const auto queries = q.as<T>(), keys = k.as<T>(), values = v.as<T>();
    std::vector<T> out(y.values.size());
    attend(view(queries.data(), q.extents), view(keys.data(), k.extents), view(values.data(), v.extents),
           view(out.data(), y.extents), options);
    // Y and the output are each computed in floats, and of half rounded to it.
    const oracle_result exact = run_oracle_on<float>(view(queries.data(), q.extents), view(keys.data(), k.extents),
                                                     view(values.data(), v.extents), options);
    comparison all;
    for (std::size_t i = 0; i < out.size(); ++i) {
      const double bound = 2 * (exact.out_bound(i) + (type == "f2" ? storing_error<Eigen::half>(y.values[i]) : 0));
      all.add(static_cast<double>(out[i]), y.values[i], bound, name + "[" + std::to_string(i) + "]");
    }
    return all;
  }
};

template <class Attend>
void expect_conformance(const Attend& attend) {
  std::map<std::string, int> cases;  // by type
  for (const auto& folder : std::filesystem::directory_iterator(test_data_folder() + "/onnx_attention")) {
    if (!folder.is_directory()) continue;
    const onnx_case c(folder.path());
    ++cases[c.type];
    EXPECT_TRUE((c.type == "f2" ? c.compare<Eigen::half>(attend) : c.compare<float>(attend)).result());
  }
  EXPECT_EQ(cases["f4"], 72);
  EXPECT_EQ(cases["f2"], 4);
  EXPECT_EQ(cases.size(), 2u);
}

TEST(OnnxAttention, TheOracleConforms) {
  GQA_NEED_TEST_DATA();
  expect_conformance([](auto q, auto k, auto v, auto out, const attention_options& options) {
    reference::attention(q, k, v, out, options);
  });
}

TEST(OnnxAttention, AttentionConforms) {
  GQA_NEED_TEST_DATA();
  context ctx;
  expect_conformance([&](auto q, auto k, auto v, auto out, const attention_options& options) {
    attention(q, k, v, out, options, ctx);
  });
}

}  // namespace
}  // namespace gqa::test

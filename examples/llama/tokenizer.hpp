// SPDX-License-Identifier: Apache-2.0
// Tokenizers of llama2.c: sentencepiece pieces with scores, merged greedily from single characters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "checkpoint.hpp"

namespace llama {

class tokenizer {
 public:
  static constexpr int bos = 1;         // starts a text; a model ends one with it, too
  static constexpr int first_byte = 3;  // tokens [3, 259) are the bytes

  // `vocab_size` pieces: int32 longest piece, then { float score, int32 length, bytes } each.
  tokenizer(const std::string& path, int vocab_size) {
    const std::vector<char> file = read_file(path);
    std::size_t at = 0;
    const auto need = [&](std::size_t bytes, int piece) {
      if (file.size() - at >= bytes) return;
      throw file_error(path, "ends within piece " + std::to_string(piece) + " of the " + std::to_string(vocab_size) +
                                 " that the model has");
    };
    const auto read = [&]<class T>(T& to, int piece) {
      need(sizeof to, piece);
      std::memcpy(&to, file.data() + at, sizeof to);
      at += sizeof to;
    };
    std::int32_t longest = 0;
    read(longest, 0);
    for (int i = 0; i < vocab_size; ++i) {
      float score = 0;
      std::int32_t length = 0;
      read(score, i);
      read(length, i);
      if (length < 0 || length > longest)
        throw file_error(path, "not a llama2.c tokenizer: piece " + std::to_string(i) + " has " +
                                   std::to_string(length) + " bytes, and the longest " + std::to_string(longest));
      const auto size = static_cast<std::size_t>(length);
      need(size, i);
      pieces_.emplace_back(file.data() + at, size);
      at += size;
      ids_.emplace(pieces_.back(), i);  // the first of equal pieces counts
      scores_.push_back(score);
    }
    if (at != file.size())
      throw file_error(path, "has more pieces than the " + std::to_string(vocab_size) + " that the model has");
    if (vocab_size < first_byte + 256) throw file_error(path, "not a llama2.c tokenizer: no pieces for the bytes");
  }

  // BOS and the tokens of `text`; a leading space is implied where there is text.
  [[nodiscard]] std::vector<int> encode(std::string_view text) const {
    std::vector<int> tokens{bos};
    if (text.empty()) return tokens;
    const std::string spaced = ' ' + std::string(text);
    for (std::size_t begin = 0; begin < spaced.size();) {
      std::size_t end = begin + 1;  // of this character: up to three continuation bytes of UTF-8
      while (end < spaced.size() && end - begin < 4 && (static_cast<unsigned char>(spaced[end]) & 0xc0) == 0x80) ++end;
      const std::string character = spaced.substr(begin, end - begin);
      if (const auto known = ids_.find(character); known != ids_.end()) {
        tokens.push_back(known->second);
      } else {
        for (const char byte : character) tokens.push_back(first_byte + static_cast<unsigned char>(byte));
      }
      begin = end;
    }
    while (merge_best_pair(tokens)) {
    }
    return tokens;
  }

  // What `token` adds to a text after `previous`. The space that starts a text's first piece is implied.
  [[nodiscard]] std::string decode(int previous, int token) const {
    const std::string& piece = pieces_.at(static_cast<std::size_t>(token));
    unsigned byte = 0;
    int read = 0;
    if (std::sscanf(piece.c_str(), "<0x%2X>%n", &byte, &read) == 1 && read == 6)
      return std::string(1, static_cast<char>(byte));
    return previous == bos && piece.starts_with(' ') ? piece.substr(1) : piece;
  }

 private:
  // Joins the neighbours whose joint piece scores best; false if none has one.
  bool merge_best_pair(std::vector<int>& tokens) const {
    float best_score = -std::numeric_limits<float>::infinity();
    std::size_t best = 0;
    int merged = -1;
    for (std::size_t i = 1; i + 1 < tokens.size(); ++i) {  // not BOS
      const auto joint =
          ids_.find(pieces_[static_cast<std::size_t>(tokens[i])] + pieces_[static_cast<std::size_t>(tokens[i + 1])]);
      if (joint == ids_.end() || scores_[static_cast<std::size_t>(joint->second)] <= best_score) continue;
      best_score = scores_[static_cast<std::size_t>(joint->second)];
      best = i;
      merged = joint->second;
    }
    if (merged < 0) return false;
    tokens[best] = merged;
    tokens.erase(tokens.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    return true;
  }

  std::vector<std::string> pieces_;
  std::vector<float> scores_;
  std::unordered_map<std::string, int> ids_;
};

}  // namespace llama

// SPDX-License-Identifier: Apache-2.0
// Tokenizers of llama2.c: sentencepiece pieces with scores, merged greedily from single characters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <queue>
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
    merge_pairs(tokens);
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
  // Two neighbours whose joint piece there is.
  struct pair {
    float score;
    std::size_t left;                     // place of the first
    int left_token, right_token, merged;  // as long as these stand there, it is this pair
    // The best last: the highest score and, of equal ones, the leftmost.
    bool operator<(const pair& other) const { return score != other.score ? score < other.score : left > other.left; }
  };

  // Joins the neighbours whose joint piece scores best, again and again until none has one. n log n for n tokens: the
  // pairs there are wait in a queue, and a token's neighbours are found by links, since joined ones leave gaps.
  void merge_pairs(std::vector<int>& tokens) const {
    constexpr int gone = -1;
    const std::size_t end = tokens.size();
    std::vector<std::size_t> next(end), before(end);
    std::priority_queue<pair> pairs;
    const auto add_pair = [&](std::size_t left) {
      if (left == 0 || next[left] == end) return;  // not BOS
      const int l = tokens[left], r = tokens[next[left]];
      const auto joint = ids_.find(pieces_[static_cast<std::size_t>(l)] + pieces_[static_cast<std::size_t>(r)]);
      if (joint == ids_.end()) return;
      const float score = scores_[static_cast<std::size_t>(joint->second)];
      if (score > -std::numeric_limits<float>::infinity()) pairs.push({score, left, l, r, joint->second});
    };
    for (std::size_t i = 0; i < end; ++i) next[i] = i + 1, before[i] = i == 0 ? 0 : i - 1;
    for (std::size_t i = 1; i < end; ++i) add_pair(i);
    while (!pairs.empty()) {
      const pair best = pairs.top();
      pairs.pop();
      const std::size_t right = next[best.left];
      if (tokens[best.left] != best.left_token || right == end || tokens[right] != best.right_token) continue;
      tokens[best.left] = best.merged;
      tokens[right] = gone;
      next[best.left] = next[right];
      if (next[right] != end) before[next[right]] = best.left;
      add_pair(before[best.left]);
      add_pair(best.left);
    }
    std::erase(tokens, gone);
  }

  std::vector<std::string> pieces_;
  std::vector<float> scores_;
  std::unordered_map<std::string, int> ids_;
};

}  // namespace llama

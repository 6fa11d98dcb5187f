// Sizes of a payload, the same for packing and unpacking. A row is one head of one token; rows are
// counted [layer][plane][token][head], as they lie on the wire.
#pragma once
#include <cstdint>

#include "kv/checksum.h"

namespace forebay::kv {

constexpr int64_t kGroup = 128;  // values that share a scale in the fp8 codec

struct Layout {
  int64_t pieces;  // layers * planes
  int64_t tokens, heads, head_dim;
  int64_t groups;           // scales of a row: 0 without codec
  int64_t row_bytes;        // of elements, or of codes
  int64_t cache_row_bytes;  // of elements
  int64_t piece_rows, rows;

  template <class Params>
  explicit Layout(const Params& p)
      : pieces(p.layers * p.planes),
        tokens(p.tokens),
        heads(p.heads),
        head_dim(p.head_dim),
        groups(p.codec == FOREBAY_KV_FP8 ? (p.head_dim + kGroup - 1) / kGroup : 0),
        row_bytes(p.head_dim * (p.codec == FOREBAY_KV_FP8 ? 1
                                : p.dtype == FOREBAY_F32  ? 4
                                                          : 2)),
        cache_row_bytes(p.head_dim * (p.dtype == FOREBAY_F32 ? 4 : 2)),
        piece_rows(p.tokens * p.heads),
        rows(p.layers * p.planes * p.tokens * p.heads) {}

  int64_t row_area() const { return rows * row_bytes; }  // where the scales begin
  int64_t scale_bytes() const { return groups * 4; }     // of a row
  int64_t bytes() const { return rows * (row_bytes + scale_bytes()); }

  // What the registers of rows that end before row `end`, and of their scales, add to the
  // payload's.
  uint32_t share(int64_t end, uint32_t of_rows, uint32_t of_scales) const {
    const int64_t after_scales = (rows - end) * scale_bytes();
    const int64_t after_rows = (rows - end) * row_bytes + rows * scale_bytes();
    return times(of_rows, power_of_x(8 * uint64_t(after_rows))) ^
           times(of_scales, power_of_x(8 * uint64_t(after_scales)));
  }
};

inline bool known(int32_t codec, int32_t id_bytes) {
  return (codec == FOREBAY_KV_RAW || codec == FOREBAY_KV_FP8) && (id_bytes == 4 || id_bytes == 8);
}

}  // namespace forebay::kv

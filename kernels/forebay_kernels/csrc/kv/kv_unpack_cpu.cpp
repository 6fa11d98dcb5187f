// The CPU's kv_unpack: every thread reads a stretch of the payload in order, checking it on the
// way.
#include "common/parallel.h"
#include "kv/codec_cpu.h"
#include "kv/runs_cpu.h"
#include "kv/stream_cpu.h"

namespace forebay::kv {
namespace {

// From so many bytes on, rows are written past the caches: what is unpacked is read steps later.
constexpr int64_t kStreamedRows = int64_t(256) << 10;
constexpr int64_t kCopied = 4096;  // bytes at once: read for the checksum, then copied

uint32_t unpack_elements(const KvUnpackParams& p, const Layout& layout, int64_t begin, int64_t end,
                         bool stream) {
  const int64_t token_bytes = layout.heads * layout.row_bytes;
  const auto* from = static_cast<const uint8_t*>(p.payload) + begin * token_bytes;
  Reader reader(from, size_t((end - begin) * token_bytes));
  for_runs(p, layout, static_cast<uint8_t*>(p.cache), begin, end, [&](uint8_t* to, int64_t rows) {
    for (int64_t left = rows * layout.row_bytes; left > 0;) {
      const int64_t count = std::min(left, kCopied);
      reader.read_to(from + count);
      if (to != nullptr) {
        copy(to, from, size_t(count), stream);
        to += count;
      }
      from += count;
      left -= count;
    }
  });
  return reader.finish();
}

template <class T>
void unpack_codes(const KvUnpackParams& p, const Layout& layout, int64_t begin, int64_t end,
                  uint32_t* of_codes, uint32_t* of_scales) {
  const auto* payload = static_cast<const uint8_t*>(p.payload);
  const int64_t row = begin * layout.heads, count_rows = (end - begin) * layout.heads;
  const uint8_t* from = payload + row * layout.row_bytes;
  const uint8_t* scale_from = payload + layout.row_area() + row * layout.scale_bytes();
  Reader codes(from, size_t(count_rows * layout.row_bytes));
  Reader scales(scale_from, size_t(count_rows * layout.scale_bytes()));
  for_runs(p, layout, static_cast<uint8_t*>(p.cache), begin, end, [&](uint8_t* to, int64_t rows) {
    auto* values = reinterpret_cast<T*>(to);
    for (; rows > 0; --rows) {
      codes.read_to(from + layout.row_bytes);
      scales.read_to(scale_from + layout.scale_bytes());
      for (int64_t left = layout.head_dim; left > 0; left -= kGroup) {
        const int64_t count = std::min(left, kGroup);
        if (to != nullptr) {
          float scale;
          memcpy(&scale, scale_from, 4);
          decode_group(from, count, scale, values);
          values += count;
        }
        from += count;
        scale_from += 4;
      }
    }
  });
  *of_codes = codes.finish();
  *of_scales = scales.finish();
}

}  // namespace
}  // namespace forebay::kv

extern "C" int forebay_kv_unpack(const KvUnpackParams* params, void*) {
  using namespace forebay;
  using namespace forebay::kv;
  const KvUnpackParams& p = *params;
  const Layout layout(p);
  if (!known(p.codec, p.id_bytes)) return FOREBAY_UNSUPPORTED;
  const bool stream = layout.rows * layout.cache_row_bytes >= kStreamedRows;
  auto* crc = static_cast<uint32_t*>(p.crc);
  __atomic_fetch_xor(crc, ends(uint64_t(layout.bytes())), __ATOMIC_RELAXED);
  return with_float_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t count = layout.pieces * layout.tokens;
    parallel_for(count, layout.heads * layout.cache_row_bytes, p.num_threads,
                 [&](int64_t begin, int64_t end) {
                   uint32_t of_rows = 0, of_scales = 0;
                   if (p.codec == FOREBAY_KV_RAW)
                     of_rows = unpack_elements(p, layout, begin, end, stream);
                   else
                     unpack_codes<T>(p, layout, begin, end, &of_rows, &of_scales);
                   __atomic_fetch_xor(crc, layout.share(end * layout.heads, of_rows, of_scales),
                                      __ATOMIC_RELAXED);
                   finish_streaming();
                 });
    return int(FOREBAY_OK);
  });
}

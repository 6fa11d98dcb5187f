// The CPU's kv_pack: every thread writes a stretch of the payload in order and checks it on the way.
#include "common/parallel.h"
#include "kv/codec_cpu.h"
#include "kv/runs_cpu.h"
#include "kv/stream_cpu.h"

namespace forebay::kv {
namespace {

uint32_t pack_elements(const KvPackParams& p, const Layout& layout, int64_t begin, int64_t end,
                       bool stream) {
  const size_t row_bytes = size_t(layout.row_bytes);
  Writer writer(static_cast<uint8_t*>(p.out) + begin * layout.heads * layout.row_bytes, stream);
  for_runs(p, layout, static_cast<const uint8_t*>(p.cache), begin, end,
           [&](const uint8_t* from, int64_t rows) {
             const size_t count = size_t(rows) * row_bytes;
             from == nullptr ? writer.put_zeros(count) : writer.put(from, count);
           });
  return writer.finish();
}

template <class T>
void pack_codes(const KvPackParams& p, const Layout& layout, int64_t begin, int64_t end,
                bool stream, uint32_t* of_codes, uint32_t* of_scales) {
  auto* out = static_cast<uint8_t*>(p.out);
  const int64_t row = begin * layout.heads;
  Writer codes(out + row * layout.row_bytes, stream);
  Writer scales(out + layout.row_area() + row * layout.scale_bytes(), stream);
  for_runs(p, layout, static_cast<const uint8_t*>(p.cache), begin, end,
           [&](const uint8_t* from, int64_t rows) {
             alignas(64) static const T kZeros[kGroup] = {};
             const auto* values = reinterpret_cast<const T*>(from);
             for (; rows > 0; --rows)
               for (int64_t left = layout.head_dim; left > 0; left -= kGroup) {
                 const int64_t count = std::min(left, kGroup);
                 const float scale =
                     encode_group(from == nullptr ? kZeros : values, count, codes.room());
                 codes.wrote(size_t(count));
                 memcpy(scales.room(), &scale, 4);
                 scales.wrote(4);
                 values += count;
               }
           });
  *of_codes = codes.finish();
  *of_scales = scales.finish();
}

}  // namespace
}  // namespace forebay::kv

extern "C" int forebay_kv_pack(const KvPackParams* params, void*) {
  using namespace forebay;
  using namespace forebay::kv;
  const KvPackParams& p = *params;
  const Layout layout(p);
  if (!known(p.codec, p.id_bytes)) return FOREBAY_UNSUPPORTED;
  const bool stream = layout.bytes() >= kStreamedBytes;
  auto* crc = static_cast<uint32_t*>(p.crc);
  __atomic_fetch_xor(crc, ends(uint64_t(layout.bytes())), __ATOMIC_RELAXED);
  return with_float_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t count = layout.pieces * layout.tokens;
    parallel_for(count, layout.heads * layout.cache_row_bytes, p.num_threads,
                 [&](int64_t begin, int64_t end) {
                   uint32_t of_rows = 0, of_scales = 0;
                   if (p.codec == FOREBAY_KV_RAW)
                     of_rows = pack_elements(p, layout, begin, end, stream);
                   else
                     pack_codes<T>(p, layout, begin, end, stream, &of_rows, &of_scales);
                   __atomic_fetch_xor(crc, layout.share(end * layout.heads, of_rows, of_scales),
                                      __ATOMIC_RELAXED);
                   finish_streaming();
                 });
    return int(FOREBAY_OK);
  });
}

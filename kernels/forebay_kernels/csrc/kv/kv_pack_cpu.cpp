// The CPU's kv_pack: every thread writes a stretch of the payload in order and checks it on the
// way.
#include "common/parallel.h"
#include "kv/codec_cpu.h"
#include "kv/runs_cpu.h"
#include "kv/stream_cpu.h"

namespace forebay::kv {
namespace {

// put(bytes, count) for tokens [begin, end): whole rows at `bytes`, which is null for zeros.
template <class Put>
void gather(const KvPackParams& p, const Layout& layout, int64_t begin, int64_t end, Put put) {
  Ahead ahead(put);
  const int64_t rows_at_once = std::max(int64_t(1), int64_t(kAheadAtOnce) / layout.cache_row_bytes);
  for_runs(p, layout, static_cast<const uint8_t*>(p.cache), begin, end,
           [&](const uint8_t* from, int64_t rows) {
             while (rows > 0) {
               const int64_t part = std::min(rows, rows_at_once);
               const size_t count = size_t(part * layout.cache_row_bytes);
               ahead.push(from, count);
               if (from != nullptr) from += count;
               rows -= part;
             }
           });
  ahead.finish();
}

uint32_t pack_elements(const KvPackParams& p, const Layout& layout, int64_t begin, int64_t end,
                       bool stream) {
  Writer writer(static_cast<uint8_t*>(p.out) + begin * layout.heads * layout.row_bytes, stream);
  gather(p, layout, begin, end, [&](const uint8_t* from, size_t count) {
    from == nullptr ? writer.put_zeros(count) : writer.put(from, count);
  });
  return writer.finish();
}

// Several groups go through each step together: their chains of operations are long and
// independent.
template <class T>
void encode_rows(const T* values, int64_t rows, const Layout& layout, Writer& codes,
                 Writer& scales) {
  constexpr int kTogether = 16;
  const int64_t num_groups = rows * layout.groups;
  for (int64_t group = 0; group < num_groups;) {
    int64_t sizes[kTogether];
    float of_scales[kTogether], inverses[kTogether];
    const int count = int(std::min<int64_t>(kTogether, num_groups - group));
    const T* at = values;
    for (int i = 0; i < count; ++i) {
      sizes[i] = std::min(kGroup, layout.head_dim - (group + i) % layout.groups * kGroup);
      inverses[i] = largest_of(at, sizes[i]);
      at += sizes[i];
    }
    for (int i = 0; i < count; ++i) {
      const Fp8Scale scale = fp8_scale(inverses[i]);
      of_scales[i] = scale.scale;
      inverses[i] = scale.inverse;
    }
    for (int i = 0; i < count; ++i) {
      encode_group(values, sizes[i], inverses[i], codes.room());
      codes.wrote(size_t(sizes[i]));
      values += sizes[i];
    }
    scales.put(of_scales, size_t(count) * 4);
    group += count;
  }
}

template <class T>
void pack_codes(const KvPackParams& p, const Layout& layout, int64_t begin, int64_t end,
                bool stream, uint32_t* of_codes, uint32_t* of_scales) {
  auto* out = static_cast<uint8_t*>(p.out);
  const int64_t row = begin * layout.heads;
  Writer codes(out + row * layout.row_bytes, stream);
  Writer scales(out + layout.row_area() + row * layout.scale_bytes(), stream);
  gather(p, layout, begin, end, [&](const uint8_t* from, size_t bytes) {
    const int64_t rows = int64_t(bytes) / layout.cache_row_bytes;
    if (from == nullptr) {
      codes.put_zeros(size_t(rows * layout.row_bytes));
      const float scale = fp8_scale(0.0f).scale;
      for (int64_t i = 0; i < rows * layout.groups; ++i) scales.put(&scale, 4);
      return;
    }
    encode_rows(reinterpret_cast<const T*>(from), rows, layout, codes, scales);
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
  const bool stream = layout.bytes() >= kStreamedPayload;
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

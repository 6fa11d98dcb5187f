// Rows of tokens to the rows of their experts: bytes, whatever they mean.
#include "common/dtypes.cuh"
#include "moe/tiling.cuh"

namespace forebay {
namespace {

constexpr int kPacks = 4;  // a thread's

template <int kBytes>
__global__ void __launch_bounds__(kTileThreads)
    moe_permute_kernel(MoePermuteParams p, Tiling tiling) {
  using Bytes = Pack<uint32_t, kBytes / 4>;
  const Place place(tiling, kPacks);
  if (place.row >= p.slots) return;
  const int64_t packs = p.row_bytes / kBytes;
  const int32_t choice = static_cast<const int32_t*>(p.order)[place.row];
  const int64_t token = choice / p.top_k;
  const bool filled = choice >= 0 && token < p.tokens;
  const Bytes* from = reinterpret_cast<const Bytes*>(static_cast<const unsigned char*>(p.x) +
                                                     (filled ? token : 0) * p.x_stride_bytes);
  Bytes* to =
      reinterpret_cast<Bytes*>(static_cast<unsigned char*>(p.out) + place.row * p.row_bytes);
  Bytes values[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t at = place.pack + i * tiling.lanes();
    values[i] = Bytes{};
    if (filled && at < packs) values[i] = from[at];
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t at = place.pack + i * tiling.lanes();
    if (at < packs) to[at] = values[i];
  }
}

template <int kBytes>
int start(const MoePermuteParams& p, void* stream) {
  const Tiling tiling(p.slots, p.row_bytes / kBytes, kPacks);
  if (!tiling.fits()) return FOREBAY_UNSUPPORTED;
  return launch(&moe_permute_kernel<kBytes>, dim3(unsigned(tiling.blocks)), dim3(kTileThreads), 0,
                stream, p, tiling);
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_moe_permute(const MoePermuteParams* params, void* stream) {
  using namespace forebay;
  const MoePermuteParams& p = *params;
  if (p.slots == 0 || p.row_bytes == 0) return FOREBAY_OK;
  if (p.top_k <= 0) return FOREBAY_INVALID;
  if (p.row_bytes % 16 == 0 && p.x_stride_bytes % 16 == 0) return start<16>(p, stream);
  if (p.row_bytes % 4 == 0 && p.x_stride_bytes % 4 == 0) return start<4>(p, stream);
  return FOREBAY_UNSUPPORTED;
}

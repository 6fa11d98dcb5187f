// The conversions of common/dtypes.cuh for tests that go through all of their arguments.
#include "common/dtypes.cuh"

namespace {

template <class T>
void read(const void* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = forebay::to_float(static_cast<const T*>(from)[i]);
}
template <class T>
void write(const float* from, void* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i] = forebay::from_float<T>(from[i]);
}

template <class Visitor>
int with_short_dtype(int32_t dtype, Visitor visit) {
  if (dtype == FOREBAY_E4M3) return visit(forebay::e4m3{});
  return dtype == FOREBAY_F32 ? int(FOREBAY_UNSUPPORTED) : forebay::with_float_dtype(dtype, visit);
}

}  // namespace

extern "C" int forebay_host_convert(const HostConvertParams* params, void*) {
  const HostConvertParams& p = *params;
  return with_short_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.to_dtype)
      write<T>(static_cast<const float*>(p.from), p.to, p.count);
    else
      read<T>(p.from, static_cast<float*>(p.to), p.count);
    return int(FOREBAY_OK);
  });
}

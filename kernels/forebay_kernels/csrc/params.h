// The arguments of every op: one struct each, read here by C++ and by forebay_kernels.params for
// Python. Pointers to tensors first, then sizes, strides (in elements unless a name says bytes) and
// numbers. A field is `type name;` on a line of its own; types are const void*, void*, int64_t,
// uint64_t, int32_t, float and double.
#pragma once
#include <stdint.h>

// An op `name` has the struct `CamelCaseNameParams` and the entry point
//   extern "C" int forebay_name(const CamelCaseNameParams* params, void* stream);
// with the same meaning in every library: on a GPU, on a CPU, and compiled over the host shim.
// It never allocates and never waits; it returns one of these, or FOREBAY_CUDA_ERROR + cudaError_t.
enum ForebayStatus {
  FOREBAY_OK = 0,
  FOREBAY_UNSUPPORTED = 1,  // not this dtype, size or device: the caller has another way
  FOREBAY_INVALID = 2,      // arguments that the caller should have refused
  FOREBAY_CUDA_ERROR = 1000,
};

enum ForebayDtype { FOREBAY_F32 = 0, FOREBAY_BF16 = 1, FOREBAY_F16 = 2, FOREBAY_E4M3 = 3 };

// total = x + residual (or x); out = total / sqrt(mean(total^2) + eps) * weight, row by row.
// With scales: out is E4M3, one scale per `group` values of a row.
struct AddRmsNormParams {
  const void* x;         // dtype [rows, width], rows x_stride apart
  const void* residual;  // dtype [rows, width], rows residual_stride apart, or null
  const void* weight;    // dtype [width]
  void* total;           // dtype [rows, width], or null: not wanted
  void* out;             // dtype or E4M3 [rows, width]
  void* scales;          // float [rows, ceil(width / group)], or null: out is not quantised
  int64_t rows;
  int64_t width;
  int64_t x_stride;
  int64_t residual_stride;
  int32_t dtype;
  int32_t group;
  int32_t num_threads;  // CPU only
  float eps;
};

// ---- kv

enum KvCodec { FOREBAY_KV_RAW = 0, FOREBAY_KV_FP8 = 1 };

// Tokens [token_start, token_start + tokens), in the coordinates of the block table, of a paged cache
// [layers, planes, num_blocks, block_size, heads, head_dim] into a payload: elements [layers, planes,
// tokens, heads, head_dim], or e4m3 codes of that shape and then float scales [layers, planes,
// tokens, heads, ceil(head_dim / 128)]. A block id outside the cache: zeros. To `crc` is XORed the
// CRC-32C of the payload.
struct KvPackParams {
  const void* cache;        // dtype, strides below, head_dim contiguous
  const void* block_table;  // int32_t or int64_t, see id_bytes
  void* out;                // bytes
  void* crc;                // uint32_t [1]
  int64_t layers;
  int64_t planes;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  int64_t num_blocks;
  int64_t block_size;
  int64_t token_start;
  int64_t layer_stride;
  int64_t plane_stride;
  int64_t block_stride;
  int64_t slot_stride;
  int64_t head_stride;
  int32_t dtype;
  int32_t codec;
  int32_t id_bytes;
  int32_t max_blocks;   // GPU only: of the grid
  int32_t num_threads;  // CPU only
};

// The way back; nothing is written for a block id outside the cache.
struct KvUnpackParams {
  const void* payload;
  const void* block_table;
  void* cache;
  void* crc;
  int64_t layers;
  int64_t planes;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  int64_t num_blocks;
  int64_t block_size;
  int64_t token_start;
  int64_t layer_stride;
  int64_t plane_stride;
  int64_t block_stride;
  int64_t slot_stride;
  int64_t head_stride;
  int32_t dtype;
  int32_t codec;
  int32_t id_bytes;
  int32_t max_blocks;   // GPU only: of the grid
  int32_t num_threads;  // CPU only
};

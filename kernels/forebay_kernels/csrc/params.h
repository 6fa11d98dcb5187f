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

// Mixture of experts, and the gated activation.

// Chooses top_k of num_experts for every token: see reference.moe_route.
struct MoeRouteParams {
  const void* logits;  // float or BF16 [tokens, num_experts], rows logits_stride apart
  const void* bias;    // float [num_experts], or null
  void* weights;       // float [tokens, top_k]
  void* ids;           // int32 [tokens, top_k]
  int64_t tokens;
  int64_t logits_stride;
  int32_t dtype;
  int32_t num_experts;
  int32_t top_k;        // at most topk_groups * (num_experts / num_groups)
  int32_t num_groups;   // divides num_experts
  int32_t topk_groups;  // at most num_groups
  int32_t softmax;      // 1: softmax, group score = its best; 0: sigmoid, = sum of its two best
  int32_t renormalise;  // 1: weights are divided by their sum + 1e-20
  int32_t num_threads;  // CPU only
  float scale;          // what weights are multiplied by
};

// A stable sort of choices by expert, each expert's rows padded to a multiple.
struct MoeAlignParams {
  const void* ids;  // int32 [choices]; outside [0, num_experts): skipped
  void* order;      // int32 [slots]: the choice in each row, or -1
  void* offsets;    // int32 [num_experts + 1]: each expert's first row; last: rows in use
  void* inverse;    // int32 [choices]: the row of each choice, or -1
  void* workspace;  // GPU only: int32 [num_blocks, num_experts], or null if num_blocks is 1
  int64_t choices;
  int64_t slots;  // at least the padded rows of all experts
  int32_t num_experts;
  int32_t multiple;
  int32_t num_blocks;  // GPU only: how many blocks share the choices
};

// out[i] = x[order[i] / top_k], or zeros where order[i] is no choice of these tokens.
struct MoePermuteParams {
  const void* x;      // [tokens, row_bytes], rows x_stride_bytes apart
  const void* order;  // int32 [slots]
  void* out;          // [slots, row_bytes]
  int64_t tokens;
  int64_t slots;
  int64_t row_bytes;
  int64_t x_stride_bytes;
  int32_t top_k;
  int32_t num_threads;  // CPU only
};

// out[t] = shared[t] + sum over k of weights[t, k] * y[inverse[t, k]], in that order, in float.
struct MoeUnpermuteParams {
  const void* y;        // dtype [slots, width], rows y_stride apart
  const void* inverse;  // int32 [tokens, top_k]; outside [0, slots): contributes nothing
  const void* weights;  // float [tokens, top_k]
  const void* shared;   // dtype [tokens, width], rows shared_stride apart, or null
  void* out;            // dtype [tokens, width]
  int64_t tokens;
  int64_t slots;
  int64_t width;
  int64_t y_stride;
  int64_t shared_stride;
  int32_t dtype;
  int32_t top_k;
  int32_t num_threads;  // CPU only
};

// out = silu(x[:, :width]) * x[:, width:], in float. With scales: out is E4M3, one scale per
// `group` values of a row.
struct SiluAndMulParams {
  const void* x;  // dtype [rows, 2 * width], rows x_stride apart
  void* out;      // dtype or E4M3 [rows, width]
  void* scales;   // float [rows, ceil(width / group)], or null: out is not quantised
  int64_t rows;
  int64_t width;
  int64_t x_stride;
  int32_t dtype;
  int32_t group;
  int32_t num_threads;  // CPU only
};

// ---- What follows the q, k and v projections.

// Queries and keys of every token are normed head by head (where weights are given) and rotated;
// keys and values go to the token's slot of the paged caches. A slot outside the cache writes
// nothing. E4M3 caches hold e4m3(value * (1 / scale)), both operations rounded as floats.
struct QkvPostParams {
  const void* qkv;       // dtype [tokens, num_q_heads + 2 * num_kv_heads, head_dim]
  const void* cos;       // float [tokens, rotated / 2]
  const void* sin;       // float [tokens, rotated / 2]
  const void* slots;     // int64_t [tokens]: block * block_size + offset
  const void* q_weight;  // dtype [head_dim], or null: queries are not normed
  const void* k_weight;  // dtype [head_dim], or null: keys are not normed
  const void* k_scale;   // float [1], or null: 1
  const void* v_scale;   // float [1], or null: 1
  void* q;               // dtype [tokens, num_q_heads, head_dim]
  void* k_cache;         // dtype or E4M3 [num_blocks, block_size, num_kv_heads, head_dim]
  void* v_cache;         // like k_cache
  int64_t tokens;
  int64_t num_blocks;
  int64_t block_size;
  int64_t token_stride;  // of qkv
  int64_t head_stride;
  int64_t k_block_stride;
  int64_t k_slot_stride;
  int64_t k_head_stride;
  int64_t v_block_stride;
  int64_t v_slot_stride;
  int64_t v_head_stride;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t rotated;      // leading values of a head that are rotated
  int32_t interleaved;  // pairs (2i, 2i + 1), else (i, i + rotated / 2)
  int32_t dtype;
  int32_t cache_dtype;
  int32_t num_threads;  // CPU only
  float eps;
};

// Latent attention: the cache's row of a token is its normed latent, then its rotated key part.
struct MlaPostParams {
  const void* kv;      // dtype [tokens, latent + rotated], rows kv_stride apart
  const void* q_pe;    // dtype [tokens, num_heads, rotated]
  const void* weight;  // dtype [latent]
  const void* cos;     // float [tokens, rotated / 2]
  const void* sin;     // float [tokens, rotated / 2]
  const void* slots;   // int64_t [tokens]
  const void* scale;   // float [1], or null: 1
  void* out;           // dtype [tokens, num_heads, rotated]: q_pe rotated
  void* cache;         // dtype or E4M3 [num_blocks, block_size, latent + rotated]
  int64_t tokens;
  int64_t num_blocks;
  int64_t block_size;
  int64_t kv_stride;
  int64_t token_stride;  // of q_pe
  int64_t head_stride;   // of q_pe
  int64_t block_stride;
  int64_t slot_stride;
  int32_t num_heads;
  int32_t latent;
  int32_t rotated;
  int32_t interleaved;
  int32_t dtype;
  int32_t cache_dtype;
  int32_t num_threads;  // CPU only
  float eps;
};

// ---- Attention.

// Partial attentions over disjoint keys become one: out = sum(exp(lses - lse) * outs) over the
// parts, lse = log(sum(exp(lses))). A part with an lse of -inf is not looked at.
struct MergeLseParams {
  const void* outs;  // dtype [parts, rows, width], parts outs_stride apart
  const void* lses;  // float [parts, rows], parts lses_stride apart
  void* out;         // dtype [rows, width]
  void* lse;         // float [rows]
  int64_t parts;
  int64_t rows;  // tokens * heads
  int64_t width;
  int64_t outs_stride;
  int64_t lses_stride;
  int32_t dtype;
  int32_t num_threads;  // CPU only
};

// ---- Sampling.

// Per draw one id of a row of logits, and its log-probability; see ops/sampling.py.
enum ForebaySample {
  FOREBAY_SAMPLE_VOCAB = 1048576,    // ids of a row at most: sums of weights stay below 2^62
  FOREBAY_SAMPLE_DRAWS = 256,        // that one launch of the kernels handles
  FOREBAY_SAMPLE_WORKSPACE = 87040,  // bytes for each of them
};

struct SampleParams {
  const void* logits;       // dtype [num_rows, vocab], rows row_stride apart
  const void* rows;         // int32_t [draws]: of the logits; one out of range draws -1
  const void* temperature;  // float [draws]; below 2^-64: the most probable id
  const void* top_k;        // int32_t [draws]; below 1: all
  const void* top_p;        // float [draws]; from 1: all
  const void* min_p;        // float [draws]; up to 0: all
  const void* seed;         // uint64_t [draws]
  const void* choice;       // uint32_t [draws]
  const void* position;     // uint32_t [draws]
  const void* bitmask;      // uint32_t [num_rows, ceil(vocab / 32)], or null
  void* token;              // int32_t [draws]
  void* logprob;            // float [draws], or null: not wanted
  void* workspace;  // FOREBAY_SAMPLE_WORKSPACE bytes for each of min(draws, FOREBAY_SAMPLE_DRAWS)
  int64_t draws;
  int64_t num_rows;
  int64_t vocab;
  int64_t row_stride;
  int32_t dtype;
  int32_t num_threads;  // CPU only
};

// ---- kv

enum KvCodec { FOREBAY_KV_RAW = 0, FOREBAY_KV_FP8 = 1 };

// Tokens [token_start, token_start + tokens), in the coordinates of the block table, of a paged
// cache [layers, planes, num_blocks, block_size, heads, head_dim] into a payload: elements [layers,
// planes, tokens, heads, head_dim], or e4m3 codes of that shape and then float scales [layers,
// planes, tokens, heads, ceil(head_dim / 128)]. A block id outside the cache: zeros. To `crc` is
// XORed the CRC-32C of the payload.
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

// ---- tests: in the host library alone

// `count` numbers of 8 or 16 bits to floats, or floats to such numbers.
struct HostConvertParams {
  const void* from;
  void* to;
  int64_t count;
  int32_t dtype;
  int32_t to_dtype;  // 0: to floats
};

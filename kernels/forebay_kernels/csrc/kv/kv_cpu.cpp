#include "params.h"

extern "C" int forebay_kv_pack(const KvPackParams*, void*) { return FOREBAY_UNSUPPORTED; }
extern "C" int forebay_kv_unpack(const KvUnpackParams*, void*) { return FOREBAY_UNSUPPORTED; }

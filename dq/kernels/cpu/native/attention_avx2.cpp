#include "avx2.h"
// the level comes first
#include "attention.h"

extern "C" int dq_attention_avx2(const DqAttention* args) { return dq::run_attention(*args); }

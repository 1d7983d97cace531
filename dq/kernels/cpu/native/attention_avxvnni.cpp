#include "common.h"
#ifdef DQ_HAS_AVXVNNI
#define DQ_AVXVNNI
#include "avx2.h"
// the level comes first
#include "attention.h"

extern "C" int dq_attention_avxvnni(const DqAttention* args) { return dq::run_attention(*args); }
#endif

#define DQ_WITHOUT_BF16
#include "avx512.h"
// the level comes first
#include "attention.h"

extern "C" int dq_attention_avx512vnni(const DqAttention* args) { return dq::run_attention(*args); }

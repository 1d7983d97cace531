#include "common.h"
#ifdef DQ_HAS_AVXVNNI
#define DQ_AVXVNNI
#include "avx2.h"
// the level comes first
#include "weightonly.h"

extern "C" int dq_weightonly_avxvnni(const DqWeightOnly* args) { return dq::run_weightonly(*args); }
extern "C" int dq_decode_avxvnni(const DqDecode* args) { return dq::run_decode(*args); }
#endif

#include "avx2.h"
// the level comes first
#include "weightonly.h"

extern "C" int dq_weightonly_avx2(const DqWeightOnly* args) { return dq::run_weightonly(*args); }
extern "C" int dq_decode_avx2(const DqDecode* args) { return dq::run_decode(*args); }

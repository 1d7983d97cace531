#include "avx512.h"
// the level comes first
#include "weightonly.h"

extern "C" int dq_weightonly_avx512(const DqWeightOnly* args) { return dq::run_weightonly(*args); }
extern "C" int dq_decode_avx512(const DqDecode* args) { return dq::run_decode(*args); }

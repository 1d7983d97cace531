#define DQ_WITHOUT_BF16
#include "avx512.h"
// the level comes first
#include "weightonly.h"

extern "C" int dq_weightonly_avx512vnni(const DqWeightOnly* args) { return dq::run_weightonly(*args); }
extern "C" int dq_decode_avx512vnni(const DqDecode* args) { return dq::run_decode(*args); }

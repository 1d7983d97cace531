#include "avx512.h"
// the level comes first
#include "conv.h"

extern "C" int dq_conv_avx512(const DqConv* args) { return dq::run_conv(*args); }

#include "common.h"
#ifdef DQ_HAS_AVXVNNI
#define DQ_AVXVNNI
#include "avx2.h"
// the level comes first
#include "conv.h"

extern "C" int dq_conv_avxvnni(const DqConv* args) { return dq::run_conv(*args); }
#endif

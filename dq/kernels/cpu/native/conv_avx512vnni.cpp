#define DQ_WITHOUT_BF16
#include "avx512.h"
// the level comes first
#include "conv.h"

extern "C" int dq_conv_avx512vnni(const DqConv* args) { return dq::run_conv(*args); }

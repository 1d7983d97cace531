#include "attention_arguments.h"
#include "fields.h"

DQ_FIELDS(DqAttention, dq_attention_fields, FIELD(q), FIELD(k), FIELD(v), FIELD(out), FIELD(mask), FIELD(batch),
          FIELD(heads), FIELD(rows), FIELD(keys), FIELD(width), FIELD(q_stride), FIELD(k_stride), FIELD(v_stride),
          FIELD(out_stride), FIELD(mask_stride), FIELD(dtype), FIELD(int8), FIELD(scale))

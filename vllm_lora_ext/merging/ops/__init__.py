"""Operations on factors: one idea per file, each on one module at a time, all in fp32."""

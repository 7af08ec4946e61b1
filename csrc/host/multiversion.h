// One build serves every x86-64: the loader picks the widest version of a function that the processor has.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define RAY_DEEPEP_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RAY_DEEPEP_MULTIVERSION
#endif

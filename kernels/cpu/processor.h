// Which processor a thread runs on.
#pragma once

#if defined(__linux__)
#include <sched.h>
#endif

namespace ternax {

// -1 where the system does not tell.
inline int current_processor() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves this thread to a processor of its own for which taken(processor) is false; without one
// it stays. What it may run on afterwards is what it was before.
template <class Taken>
void move_to_processor(const Taken& taken) {
#if defined(__linux__)
  cpu_set_t allowed, free;
  if (sched_getaffinity(0, sizeof(allowed), &allowed)) return;
  free = allowed;
  for (int i = 0; i < CPU_SETSIZE; i++)
    if (CPU_ISSET(i, &free) && taken(i)) CPU_CLR(i, &free);
  if (CPU_COUNT(&free) && !sched_setaffinity(0, sizeof(free), &free)) sched_setaffinity(0, sizeof(allowed), &allowed);
#else
  static_cast<void>(taken);
#endif
}

}  // namespace ternax

// The library's entry points, for the Model and the Story that the generated source has defined.
#pragma once
#include <cstdio>
#include <exception>

#include "engine.h"

using ThisEngine = Engine<Model, Story>;

// A new engine; null, with the reason as text, where the system has no memory or threads for it.
FF_ENTRY ThisEngine* flashformer_create(const Params* params, char* reason, u32 room) {
  try {
    return new ThisEngine(*params);
  } catch (const std::exception& error) {
    std::snprintf(reason, room, "%s", error.what());
    return nullptr;
  }
}

FF_ENTRY void flashformer_start(ThisEngine* engine, const Launch* launch) { engine->start(*launch); }

FF_ENTRY void flashformer_wait(ThisEngine* engine, u32 seen, double seconds, Status* status, Progress* progress) {
  *status = engine->wait(seen, seconds, progress);
}

FF_ENTRY void flashformer_copy(ThisEngine* engine, u32 from, u32 to, u32 positions) { engine->copy(from, to, positions); }

FF_ENTRY void flashformer_cancel(ThisEngine* engine) { engine->cancel(); }

FF_ENTRY void flashformer_destroy(ThisEngine* engine) { delete engine; }

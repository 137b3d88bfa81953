#pragma once

#include <string>

#include "finetune_flags.h"

namespace gemma_torch::apps {

/// Makes the model that --from-scratch asks for, as the folder OUT/initial, and returns that folder's path; one that an
/// earlier try with the same flags has left is taken. Throws: Error naming what is wrong with the config or tokenizer,
/// or if the folder holds other weights than the flags would make.
std::string make_initial(const FinetuneFlags& flags);

/// The --plain-text file `path` cut into windows, as the file OUT/`name`, whose path is returned. Throws: Error as
/// write_text_windows, or where the model has no tokenizer.
std::string make_windows(const FinetuneFlags& flags,
                         const Pretrained& loaded,
                         const std::string& path,
                         const std::string& name);

}  // namespace gemma_torch::apps

#pragma once

#include <string>
#include <vector>

/// A damaged file and what reading it must say.
struct Damaged {
  std::string name = {};
  std::string bytes = {};
  std::string message = {};  // part of the Error's message
};

/// By the reader they are for. Each is a tiny good file with one thing wrong.
std::vector<Damaged> damaged_safetensors();
std::vector<Damaged> damaged_gguf();
std::vector<Damaged> damaged_gguf_models();  // readable GGUF that is no Gemma 3
std::vector<Damaged> damaged_configs();
std::vector<Damaged> damaged_tokenizer_jsons();
std::vector<Damaged> damaged_tokenizer_models();

/// The good files they were made from (the GGUF one is tiny_gemma_gguf of gguf_writer.h).
std::string good_safetensors();
std::string good_config();
std::string good_tokenizer_json();
std::string good_tokenizer_model();

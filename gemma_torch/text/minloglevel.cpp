// Compiled into every executable that links gemma_torch (CMake does it through INTERFACE sources).
//
// libsentencepiece and libc10 both export a variable of this name: an object of 32 bytes in the first, an int in
// the second. The dynamic linker keeps one of them for both. Where it keeps libc10's, sentencepiece's start-up
// writes over libc10's neighbouring globals, and a failed c10 check then aborts or hangs instead of throwing.
// A definition in the executable, large enough for either, comes before both.
extern "C" {
extern unsigned char FLAGS_minloglevel[64];
alignas(64) __attribute__((visibility("default"), used)) unsigned char FLAGS_minloglevel[64] = {};
}

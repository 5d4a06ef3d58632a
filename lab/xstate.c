// SPDX-License-Identifier: MIT
/*
 * For User-Mode Linux on a processor with AMX; see uml.py, which preloads it.
 *
 * Linux writes a process's extended registers (PTRACE_SETREGSET) only from as
 * many bytes as the processor's all take, 11 KiB with AMX's tiles. User-Mode
 * Linux 6.1 has room for 2,696, which is all up to AVX-512 and the
 * protection keys, and its first process ends with EFAULT. Here the rest is
 * added: as it is in a process that has never used a tile.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <string.h>
#include <sys/uio.h>

#define SETREGSET 0x4205
#define GETREGSET 0x4204
#define NT_X86_XSTATE 0x202
#define IN_USE_AT 512 /* which registers aren't as they were at the start */
#define TILES (3ULL << 17)

static long (*original)(int request, ...);

static long set_registers(void *process, const struct iovec *given)
{
	static size_t all;
	static unsigned char registers[1 << 16];
	struct iovec whole = { .iov_base = registers };
	unsigned long long in_use;

	if (!all) {
		whole.iov_len = sizeof(registers);
		if (original(GETREGSET, process, NT_X86_XSTATE, &whole))
			return -1;
		all = whole.iov_len;
	}
	if (given->iov_len >= all ||
	    given->iov_len < IN_USE_AT + sizeof(in_use))
		return original(SETREGSET, process, NT_X86_XSTATE, given);
	memcpy(registers, given->iov_base, given->iov_len);
	memset(registers + given->iov_len, 0, all - given->iov_len);
	memcpy(&in_use, registers + IN_USE_AT, sizeof(in_use));
	in_use &= ~TILES;
	memcpy(registers + IN_USE_AT, &in_use, sizeof(in_use));
	whole.iov_len = all;
	return original(SETREGSET, process, NT_X86_XSTATE, &whole);
}

long ptrace(int request, ...)
{
	va_list words;
	void *process, *address, *data;

	if (!original)
		original = (long (*)(int, ...))dlsym(RTLD_NEXT, "ptrace");
	va_start(words, request);
	process = va_arg(words, void *);
	address = va_arg(words, void *);
	data = va_arg(words, void *);
	va_end(words);
	if (request == SETREGSET && address == (void *)NT_X86_XSTATE)
		return set_registers(process, data);
	return original(request, process, address, data);
}

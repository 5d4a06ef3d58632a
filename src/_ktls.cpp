// SPDX-License-Identifier: MIT
// Python's view of ktls.h: arguments and errors are converted here, the GIL is
// released round every system call. Nothing else happens in this file.
#include <pybind11/pybind11.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <string_view>
#include <unistd.h>

#include "_lane.h"
#include "ktls.h"

namespace py = pybind11;

namespace
{

// Raises the OSError subclass that fits -error; its text names the call.
[[noreturn]] void raise_os_error(int error, const char *call)
{
	std::string text = std::string(call) + ": " + std::strerror(-error);
	// Made here: pybind11 refuses an OSError that becomes its subclass only
	// later, as it does where another exception is being handled.
	py::object made = py::handle(PyExc_OSError)(-error, text);

	PyErr_SetObject(py::type::handle_of(made).ptr(), made.ptr());
	throw py::error_already_set();
}

// Makes a call of the core's with the GIL released round it. A daemon thread that
// wants the GIL back while Python exits is unwound, up to Python 3.13. That must
// not get as far as a destructor: they need the GIL, and gil_scoped_release's own
// would end the process by std::terminate(). Such a thread waits here for the end,
// which is what later Pythons do.
template <typename Call> auto without_gil(Call call)
{
	PyThreadState *state = PyEval_SaveThread();
	auto result = call();

	try {
		PyEval_RestoreThread(state);
	} catch (...) {
		for (;;)
			pause();
	}
	return result;
}

const char *direction_call(int direction, const char *tx, const char *rx)
{
	return direction == KTLS_RX ? rx : tx;
}

// Wiped on every way out of its scope.
struct Keys : ktls_keys {
	Keys() : ktls_keys()
	{
	}
	~Keys()
	{
		ktls_wipe(static_cast<ktls_keys *>(this), sizeof(ktls_keys));
	}
};

// A contiguous buffer, held while the GIL is away.
class View
{
    public:
	View(const py::object &object, int flags)
	{
		if (PyObject_GetBuffer(object.ptr(), &view_, flags))
			throw py::error_already_set();
	}
	View(const View &) = delete;
	View &operator=(const View &) = delete;
	~View()
	{
		PyBuffer_Release(&view_);
	}
	void *data() const
	{
		return view_.buf;
	}
	size_t size() const
	{
		return static_cast<size_t>(view_.len);
	}

    private:
	Py_buffer view_;
};

void copy_exactly(const char *name, const py::bytes &from, uint8_t *to,
		  size_t size)
{
	std::string_view bytes = from;

	if (bytes.size() != size)
		throw py::value_error(std::string(name) + " must be " +
				      std::to_string(size) + " bytes, not " +
				      std::to_string(bytes.size()));
	std::memcpy(to, bytes.data(), size);
}

py::bytes to_bytes(const uint8_t *data, size_t size)
{
	return py::bytes(reinterpret_cast<const char *>(data), size);
}

py::list cipher_table()
{
	py::list rows;
	const ktls_cipher *row;

	for (size_t i = 0; (row = ktls_cipher_at(i)); i++)
		rows.append(py::make_tuple(row->id, row->name, row->key_size,
					   row->iv_size, row->salt_size,
					   row->tag_size, bool(row->tls12),
					   bool(row->tls13)));
	return rows;
}

void attach(int fd)
{
	int error = without_gil([&] { return ktls_attach(fd); });
	if (error)
		raise_os_error(error, "setsockopt(TCP_ULP)");
}

void fill(Keys &keys, uint16_t version, uint16_t cipher, const py::bytes &key,
	  const py::bytes &iv, const py::bytes &salt, const py::bytes &rec_seq)
{
	const ktls_cipher *row = ktls_cipher_by_id(cipher);

	if (!row)
		throw py::value_error("unknown cipher " +
				      std::to_string(cipher));
	keys.version = version;
	keys.cipher = row->id;
	copy_exactly("key", key, keys.key, row->key_size);
	copy_exactly("iv", iv, keys.iv, row->iv_size);
	copy_exactly("salt", salt, keys.salt, row->salt_size);
	copy_exactly("rec_seq", rec_seq, keys.rec_seq, KTLS_REC_SEQ);
}

void install(int fd, int direction, uint16_t version, uint16_t cipher,
	     const py::bytes &key, const py::bytes &iv, const py::bytes &salt,
	     const py::bytes &rec_seq)
{
	Keys keys;
	int error;

	fill(keys, version, cipher, key, iv, salt, rec_seq);
	error = without_gil([&] { return ktls_install(fd, direction, &keys); });
	if (error)
		raise_os_error(error,
			       direction_call(direction, "setsockopt(TLS_TX)",
					      "setsockopt(TLS_RX)"));
}

// The record's error is raised; that of the keys, which comes too late for it,
// is returned.
int update_key(int fd, int flags, int request, uint16_t version,
	       uint16_t cipher, const py::bytes &key, const py::bytes &iv,
	       const py::bytes &salt, const py::bytes &rec_seq)
{
	Keys keys;
	int error, installed;

	fill(keys, version, cipher, key, iv, salt, rec_seq);
	error = without_gil([&] {
		return ktls_update_key(fd, &keys, request, flags, &installed);
	});
	if (error)
		raise_os_error(error, "sendmsg");
	return -installed;
}

// None for any error: every new connection is asked, and an exception would cost
// more than the rest of the answer.
py::object installed(int fd, int direction)
{
	uint16_t version, cipher;
	int error = without_gil([&] {
		return ktls_installed(fd, direction, &version, &cipher);
	});
	if (error)
		return py::none();
	return py::make_tuple(version, cipher);
}

// The key and the salt stay behind: they are wiped with their struct.
py::tuple query(int fd, int direction)
{
	Keys keys;
	int error =
		without_gil([&] { return ktls_query(fd, direction, &keys); });
	if (error)
		raise_os_error(error,
			       direction_call(direction, "getsockopt(TLS_TX)",
					      "getsockopt(TLS_RX)"));
	const ktls_cipher *row = ktls_cipher_by_id(keys.cipher);
	return py::make_tuple(keys.version, keys.cipher,
			      to_bytes(keys.iv, row->iv_size),
			      to_bytes(keys.rec_seq, KTLS_REC_SEQ));
}

void set_option(int fd, int option, unsigned int value)
{
	int error =
		without_gil([&] { return ktls_set_option(fd, option, value); });
	if (error)
		raise_os_error(error, "setsockopt(SOL_TLS)");
}

unsigned int get_option(int fd, int option)
{
	unsigned int value;
	int error = without_gil(
		[&] { return ktls_get_option(fd, option, &value); });
	if (error)
		raise_os_error(error, "getsockopt(SOL_TLS)");
	return value;
}

py::tuple stream(int fd)
{
	ktls_stream at;
	int error = without_gil([&] { return ktls_get_stream(fd, &at); });
	if (error)
		raise_os_error(error, "getsockopt(TCP_INFO)");
	return py::make_tuple(at.state, at.acked, at.queued, at.received);
}

size_t send_record(int fd, int type, const py::object &data, int flags)
{
	View view(data, PyBUF_SIMPLE);
	ssize_t n;

	if (type < 0 || type > 255)
		throw py::value_error("a record type is 0 to 255, not " +
				      std::to_string(type));
	n = without_gil([&] {
		return ktls_send_record(fd, static_cast<uint8_t>(type),
					view.data(), view.size(), flags);
	});
	if (n < 0)
		raise_os_error(static_cast<int>(n), "sendmsg");
	return static_cast<size_t>(n);
}

void flush(int fd, int flags)
{
	int error = without_gil([&] { return ktls_flush(fd, flags); });
	if (error)
		raise_os_error(error, "sendmsg");
}

void push(int fd)
{
	int error = without_gil([&] { return ktls_push(fd); });
	if (error)
		raise_os_error(error, "getsockopt(SO_SNDBUF)");
}

py::tuple recv_record_into(int fd, const py::object &buffer, int flags)
{
	View view(buffer, PyBUF_WRITABLE);
	ktls_record record;
	ssize_t n = without_gil([&] {
		return ktls_recv_record(fd, view.data(), view.size(), flags,
					&record);
	});
	if (n < 0)
		raise_os_error(static_cast<int>(n), "recvmsg");
	return py::make_tuple(n, record.type, bool(record.end));
}

// Everything side by side, as in Lane.send_part: nothing may hide a count.
py::tuple recvfile(int fd, int pipe_out, int pipe_in, int file, uint64_t offset,
		   size_t count)
{
	const int pipe[2] = { pipe_out, pipe_in };
	ktls_received received;
	int error;
	py::object pending = py::none();
	error = without_gil([&] {
		return ktls_recvfile(fd, pipe, file, offset, count, &received);
	});
	if (PyErr_CheckSignals()) {
		py::error_already_set exception;
		pending = exception.value();
	}
	return py::make_tuple(received.written, received.held,
			      -received.refusal, -error, pending);
}

// What C made, or the exception that it set.
py::object owned(PyObject *made)
{
	if (!made)
		throw py::error_already_set();
	return py::reinterpret_steal<py::object>(made);
}

py::object by_lane(const py::object &function)
{
	return owned(ktls_by_lane(function.ptr()));
}

} // namespace

PYBIND11_MODULE(_ktls, module, py::mod_gil_not_used())
{
	module.doc() = "The kernel's TLS record layer: ktls.h for Python.";
	module.attr("Lane") = owned(ktls_lane_type());
	module.attr("Intake") = owned(ktls_intake_type());
	module.attr("TX") = KTLS_TX;
	module.attr("RX") = KTLS_RX;
	module.attr("TX_ZEROCOPY_RO") = KTLS_TX_ZEROCOPY_RO;
	module.attr("RX_EXPECT_NO_PAD") = KTLS_RX_EXPECT_NO_PAD;
	module.attr("TX_MAX_PAYLOAD_LEN") = KTLS_TX_MAX_PAYLOAD_LEN;
	module.attr("VERSION_1_2") = KTLS_VERSION_1_2;
	module.attr("VERSION_1_3") = KTLS_VERSION_1_3;
	module.attr("RECORD_NONE") = KTLS_RECORD_NONE;
	module.attr("REC_SEQ_SIZE") = KTLS_REC_SEQ;
	module.attr("MAX_PAYLOAD") = KTLS_MAX_PAYLOAD;
	module.def("by_lane", by_lane, py::arg("function"));
	module.def("cipher_table", cipher_table);
	module.def("attach", attach, py::arg("fd"));
	module.def("install", install, py::arg("fd"), py::arg("direction"),
		   py::kw_only(), py::arg("version"), py::arg("cipher"),
		   py::arg("key"), py::arg("iv"), py::arg("salt"),
		   py::arg("rec_seq"));
	module.def("update_key", update_key, py::arg("fd"), py::arg("flags"),
		   py::kw_only(), py::arg("request"), py::arg("version"),
		   py::arg("cipher"), py::arg("key"), py::arg("iv"),
		   py::arg("salt"), py::arg("rec_seq"));
	module.def("installed", installed, py::arg("fd"), py::arg("direction"));
	module.def("query", query, py::arg("fd"), py::arg("direction"));
	module.def("set_option", set_option, py::arg("fd"), py::arg("option"),
		   py::arg("value"));
	module.def("get_option", get_option, py::arg("fd"), py::arg("option"));
	module.def("stream", stream, py::arg("fd"));
	module.def("send_record", send_record, py::arg("fd"), py::arg("type"),
		   py::arg("data"), py::arg("flags") = 0);
	module.def("flush", flush, py::arg("fd"), py::arg("flags") = 0);
	module.def("push", push, py::arg("fd"));
	module.def("recv_record_into", recv_record_into, py::arg("fd"),
		   py::arg("buffer"), py::arg("flags") = 0);
	module.def("recvfile", recvfile, py::arg("fd"), py::arg("pipe_out"),
		   py::arg("pipe_in"), py::arg("file"), py::arg("offset"),
		   py::arg("count"));
}

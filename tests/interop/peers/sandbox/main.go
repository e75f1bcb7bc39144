// Command sandbox runs a program that can open no netlink socket, as in gVisor and under the
// seccomp profiles of some container runtimes: socket(2) fails with EAFNOSUPPORT.
//
//	sandbox PROGRAM [ARGUMENT...]
package main

import (
	"log"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	log.SetPrefix("sandbox: ")
	if len(os.Args) < 2 {
		log.Fatal("no program")
	}
	// The filter is the calling thread's, and goes on with the program that it becomes.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		log.Fatal("no_new_privs: ", err)
	}
	if err := install(filter()); err != nil {
		log.Fatal("seccomp: ", err)
	}
	if socket, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, 0); err == nil {
		unix.Close(socket)
		log.Fatal("a netlink socket was opened")
	}
	log.Fatal(unix.Exec(os.Args[1], os.Args[1:], os.Environ()))
}

// filter refuses socket(AF_NETLINK, ...). It looks at struct seccomp_data: the number of the system
// call at 0, the lower half of its first argument at 16 on a little-endian machine.
func filter() []unix.SockFilter {
	const (
		load   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		result = unix.BPF_RET | unix.BPF_K
	)
	return []unix.SockFilter{
		{Code: load, K: 0},
		{Code: equal, K: unix.SYS_SOCKET, Jt: 0, Jf: 3},
		{Code: load, K: 16},
		{Code: equal, K: unix.AF_NETLINK, Jt: 0, Jf: 1},
		{Code: result, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)},
		{Code: result, K: unix.SECCOMP_RET_ALLOW},
	}
}

func install(filter []unix.SockFilter) error {
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return errno
	}
	return nil
}

package imagetest

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// PrivateMounts gives the calling goroutine a mount namespace of its own, so
// that what the test mounts is seen by this goroutine only and gone with it,
// however the test ends. It skips the test where the process may not do that.
func PrivateMounts(t *testing.T) {
	t.Helper()
	NeedRoot(t)
	// Never unlocked: the thread ends with the goroutine, and the namespace
	// with the thread.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		t.Skipf("needs CAP_SYS_ADMIN to make a mount namespace: %v", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
}

// NeedRoot skips the test unless it runs as root.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: owners and device nodes are part of what is tested")
	}
}

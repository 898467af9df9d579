package imagetest

import (
	"os"
	"os/exec"
	"regexp"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// isolatedEnv marks the process that Isolated has started.
const isolatedEnv = "ONDOL_TEST_ISOLATED"

// Isolated runs the calling test in a process with a mount namespace of its
// own, which all its threads share, so that a test can mount what it likes and
// nothing is left. In the first process it returns true when that is done, and
// the test must return; in the second one it returns false, and the test goes
// on. It skips the test where the process may not make namespaces.
func Isolated(t *testing.T) bool {
	t.Helper()
	NeedRoot(t)
	if os.Getenv(isolatedEnv) == t.Name() {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		return false
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+regexp.QuoteMeta(t.Name())+"$", "-test.v", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), isolatedEnv+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if _, started := err.(*exec.ExitError); err != nil && !started { // as exec returns it
		t.Skipf("needs CAP_SYS_ADMIN to make a mount namespace: %v", err)
	}
	if err != nil {
		t.Errorf("in its own namespace: %v\n%s", err, out)
	}
	return true
}

package mount

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// The test binary runs again in these roles.
const roleEnv = "SHALE_MOUNT_TEST_ROLE"

func runRole(role string, args []string) {
	switch role {
	case "serve":
		roleServe(args[0], args[1], args[2])
	case "mmap":
		roleMmap(args[0])
	case "probe":
		fmt.Printf("%+v\n", Probe())
	case "hello":
		fmt.Println("hello")
	}
	os.Exit(0)
}

// roleServe serves an image attached at dir until it is killed. Reads of
// blocks that are wholly bytes 0xEE hang.
func roleServe(img, dir, hang string) {
	data, err := os.ReadFile(img)
	if err != nil {
		panic(err)
	}
	c := &memContent{data: data}
	lo := int64(strings.Index(string(data), strings.Repeat("\xee", 4096)))
	if hang == "hang" && lo < 0 {
		panic("no block to hang on")
	}
	hi := lo
	for hi >= 0 && hi < int64(len(data)) && data[hi] == 0xee {
		hi++
	}
	c.onTry(func(off int64, n int) bool { return hang != "hang" || off >= hi || off+int64(n) <= lo })
	c.onRead(func(ctx context.Context, off int64, n int) error {
		fmt.Println("hangs")
		<-ctx.Done()
		return ctx.Err()
	})
	m, err := Device(context.Background(), c, Options{})
	if err != nil {
		panic(err)
	}
	if err := Attach(m.FD(), dir); err != nil {
		panic(err)
	}
	m.Close()
	fmt.Println("ready")
	<-m.Done()
}

// roleMmap maps a file and prints the digest of what it sees, or the fault. It
// is a process of its own: a page fault of the serving process on its own
// mount would stop its garbage collector, and so the server.
func roleMmap(path string) {
	debug.SetPanicOnFault(true)
	defer func() {
		if e := recover(); e != nil {
			fmt.Println("fault")
			os.Exit(0)
		}
	}()
	f, err := os.Open(path)
	if err != nil {
		fmt.Println("error", err)
		return
	}
	st, err := f.Stat()
	if err != nil {
		fmt.Println("error", err)
		return
	}
	p, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		fmt.Println("error", err)
		return
	}
	fmt.Printf("%x\n", sha256.Sum256(p))
}

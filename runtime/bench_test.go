package runtime

import (
	"fmt"
	"os"
	"testing"
	"time"
)

// BenchmarkRun measures /bin/true from Start to the end of Close, and how much
// of it is left after Start. The machine idles before each start, as it does
// before a person's: without the pause the kernel's RCU grace periods, which
// cgroups wait for, look free.
func BenchmarkRun(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	if _, err := os.Stat("/bin/busybox"); err != nil {
		b.Skip("needs /bin/busybox, statically linked: Debian's busybox-static")
	}
	root, err := os.Open(newRoot(b))
	if err != nil {
		b.Fatal(err)
	}
	defer root.Close()
	for _, name := range []string{"crun", "runc"} {
		path, err := Find(name)
		if err != nil {
			continue
		}
		for _, cgroup := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/cgroup=%v", name, cgroup), func(b *testing.B) {
				o := Options{Runtime: path, StateDir: newState(b), Remove: true, Stderr: os.Stderr}
				var early, run, end time.Duration
				for b.Loop() {
					b.StopTimer()
					time.Sleep(300 * time.Millisecond)
					b.StartTimer()
					t0 := time.Now()
					c, err := Start(o)
					if err != nil {
						b.Fatal(err)
					}
					t1 := time.Now()
					if code, err := c.Run(b.Context(), root, Config{Args: []string{"/bin/true"}, Cgroup: cgroup}); err != nil || code != 0 {
						b.Fatal(code, err)
					}
					t2 := time.Now()
					c.Close()
					early, run, end = early+t1.Sub(t0), run+t2.Sub(t1), end+time.Since(t2)
				}
				for unit, d := range map[string]time.Duration{"start-us": early, "run-us": run, "close-us": end} {
					b.ReportMetric(float64(d.Microseconds())/float64(b.N), unit)
				}
			})
		}
	}
}

package runtime

import (
	"fmt"
	"os"
	"testing"
	"time"
)

// BenchmarkRun measures /bin/true through Start, Run and Close, the best of
// all iterations: what else the machine does only adds. It idles before each
// start, as it does before a person's: without the pause the kernel's RCU grace
// periods, which cgroups wait for, look free.
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
				best := map[string]time.Duration{}
				note := func(unit string, d time.Duration) {
					if old, ok := best[unit]; !ok || d < old {
						best[unit] = d
					}
				}
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
					note("start-us", t1.Sub(t0))
					note("run-us", t2.Sub(t1))
					note("close-us", time.Since(t2))
					note("all-us", time.Since(t0))
				}
				for unit, d := range best {
					b.ReportMetric(float64(d.Microseconds()), unit)
				}
			})
		}
	}
}

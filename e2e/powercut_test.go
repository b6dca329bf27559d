package e2e

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestPowerCut cuts the power of a virtual machine (e2e/powercut) in the midst
// of storing chunks, again and again. After each cut, what the pool believes to
// have has the right bytes, and what it had synced, or believed after an
// earlier cut, is still there. Meanwhile another segment is sealed and unsealed.
//
// SHALE_POWERCUT_ROUNDS is how often, SHALE_POWERCUT_SEED repeats the choices.
func TestPowerCut(t *testing.T) {
	if testing.Short() {
		t.Skip("emulates a machine: not in short mode")
	}
	m := newMachine(t, "./powercut")
	for name, cut := range map[string]powerCut{
		// Whatever the machine wrote is on the disk: no write is lost that
		// reached it, and none that did not is there.
		"reset": m.reset,
		// Of what the machine did not flush any sector may be on the disk.
		"replay": m.replay,
	} {
		t.Run(name, func(t *testing.T) { testPowerCut(t, m, cut) })
	}
}

// powerCut boots the machine for a round, tells seen what it says line by line,
// and cuts its power when that says so. Lines that it has not seen prove
// nothing about what is on the disk; they need not be told.
type powerCut func(t *testing.T, r *rand.Rand, disk string, round int, seen func(line string) *time.Duration)

func testPowerCut(t *testing.T, m *machine, cut powerCut) {
	rounds, seed := 5, uint64(time.Now().UnixNano())
	fromEnv(t, "SHALE_POWERCUT_ROUNDS", func(s string) (err error) { rounds, err = strconv.Atoi(s); return })
	fromEnv(t, "SHALE_POWERCUT_SEED", func(s string) (err error) { seed, err = strconv.ParseUint(s, 10, 64); return })
	t.Logf("SHALE_POWERCUT_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	disk := m.newDisk(t)
	g := guest{rounds: map[int]*promise{}, boots: map[string]bool{}}
	defer func() {
		if g.seals == 0 && !t.Failed() {
			t.Error("nothing was sealed")
		}
	}()
	for n := 0; n <= rounds && !t.Failed(); n++ {
		last := n == rounds
		g.start(n)
		// Mostly while chunks are stored; sometimes while the pool is opened,
		// checked, or a segment is made.
		word, after := "created", time.Duration(r.Int64N(int64(2*time.Second)))
		if !last && r.IntN(5) == 0 {
			word, after = "boot", after/3
		}
		if last {
			after = 0
		}
		cut(t, r, disk, n, func(line string) *time.Duration {
			kind, err := g.line(line)
			if err != nil {
				t.Error(err)
				return new(time.Duration)
			}
			if kind == word {
				return &after
			}
			return nil
		})
		t.Logf("round %d: cut %v after %q; %s", n, after.Round(time.Millisecond), word, &g)
		if err := g.missing(word == "created"); err != nil && !t.Failed() {
			t.Error(err)
		}
	}
}

func fromEnv(t *testing.T, name string, parse func(string) error) {
	t.Helper()
	if s := os.Getenv(name); s != "" {
		if err := parse(s); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
}

// guest is what the machine said up to now.
type guest struct {
	round  int
	boots  map[string]bool
	rounds map[int]*promise
	seals  int         // segments that were sealed and unsealed
	told   map[int]int // what is present of former rounds, as told in this one
}

// promise is what has to be there of a round after a power cut.
type promise struct {
	present []byte // bits
	full    bool
}

func (g *guest) start(round int) { g.round, g.told = round, map[int]int{} }

func (g *guest) line(line string) (kind string, err error) {
	f := strings.Fields(line)
	if len(f) < 2 || f[0] != "powercut:" {
		if strings.Contains(line, "panic") || strings.Contains(line, "EXT4-fs error") {
			return "", fmt.Errorf("round %d: %s", g.round, line)
		}
		return "", nil // of the kernel
	}
	kind, f = f[1], f[2:]
	switch {
	case kind == "boot" && len(f) == 1:
		if g.boots[f[0]] {
			err = fmt.Errorf("boot %s, for the second time", f[0])
		}
		g.boots[f[0]] = true
	case kind == "segment" && len(f) == 2:
		err = g.segment(f[0], f[1])
	case kind == "created" && len(f) == 1:
		g.rounds[g.round] = &promise{}
	case kind == "synced" && len(f) > 0:
		err = g.rounds[g.round].synced(f)
	case kind == "sealing" && len(f) == 2:
		err = g.sealing(f[0], f[1])
	case kind == "sealed" && len(f) == 1:
		g.seals++
	case kind == "full":
		g.rounds[g.round].full = true
	default:
		err = fmt.Errorf("round %d: %s", g.round, line)
	}
	return kind, err
}

func (p *promise) synced(counts []string) error {
	for w, s := range counts {
		n, err := strconv.Atoi(s)
		if err != nil {
			return err
		}
		for k := range n {
			p.set(w + k*len(counts))
		}
	}
	return nil
}

// sealing promises all chunks of a segment but the first.
func (g *guest) sealing(round, chunks string) error {
	r, err := strconv.Atoi(round)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(chunks)
	if err != nil {
		return err
	}
	p := &promise{}
	for i := 1; i < n; i++ {
		p.set(i)
	}
	g.rounds[r] = p
	return nil
}

func (p *promise) set(i int) {
	if short := i/8 + 1 - len(p.present); short > 0 {
		p.present = append(p.present, make([]byte, short)...)
	}
	p.present[i/8] |= 1 << (i % 8)
}

// segment compares what is present of a round with what was promised.
func (g *guest) segment(round, bits string) error {
	r, err := strconv.Atoi(round)
	if err != nil {
		return err
	}
	present, err := hex.DecodeString(bits)
	if err != nil {
		return err
	}
	if p := g.rounds[r]; p != nil {
		for i, b := range p.present {
			if lost := b &^ present[i]; lost != 0 {
				return fmt.Errorf("boot %d: segment of round %d: of chunks %d to %d those in %08b were present and are gone", g.round, r, i*8, i*8+7, lost)
			}
		}
	}
	g.rounds[r] = &promise{present: present}
	g.told[r] = count(present)
	return nil
}

// missing tells which segments the machine should have told of and did not.
func (g *guest) missing(all bool) error {
	for r := g.round - 2; all && r < g.round; r++ {
		if _, ok := g.told[r]; !ok && g.rounds[r] != nil {
			return fmt.Errorf("boot %d: the segment of round %d is gone", g.round, r)
		}
	}
	return nil
}

func (g *guest) String() string {
	s := fmt.Sprintf("present of former rounds: %v; %d times sealed and unsealed", g.told, g.seals)
	if p := g.rounds[g.round]; p != nil {
		s += fmt.Sprintf("; of this one %d synced", count(p.present))
		if p.full {
			s += ", all there is"
		}
	}
	return s
}

func count(bits []byte) (n int) {
	for _, b := range bits {
		n += strings.Count(strconv.FormatUint(uint64(b), 2), "1")
	}
	return n
}

// reset is the cut by kill -9.
func (m *machine) reset(t *testing.T, _ *rand.Rand, disk string, round int, seen func(string) *time.Duration) {
	v := m.boot(t, round, "driver=raw,node-name=disk,file.driver=file,file.filename="+disk)
	v.watch(t, seen)
	v.kill()
	// What was said before the cut is true, also what is read only now.
	for line := range v.lines {
		seen(line)
	}
}

// replay is the cut by which the disk forgets.
func (m *machine) replay(t *testing.T, r *rand.Rand, disk string, round int, seen func(string) *time.Duration) {
	run, log := disk+".run", disk+".log"
	command(t, "cp", "--sparse=always", disk, run)
	defer os.Remove(run)
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(log)
	v := m.boot(t, round, "driver=blklogwrites,node-name=disk,log-sector-size=512"+
		",file.driver=file,file.filename="+run+",log.driver=file,log.filename="+log)
	v.watch(t, seen)
	// What supports all that was seen is in the log by now.
	st, err := os.Stat(log)
	if err != nil {
		t.Fatal(err)
	}
	v.quit(t) // with what is in flight, so that the log has no holes
	writes, err := readWriteLog(log, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	kept, lost, err := writes.replay(r, disk)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d writes; of those after the last flush %d sectors kept, %d lost", len(writes), kept, lost)
}

// A machine that never says what it should is ended, and said so.
const patience = 5 * time.Minute

// watch tells seen all lines until it names a time, and that has passed.
func (v *vm) watch(t *testing.T, seen func(string) *time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var (
		last bytes.Buffer
		cut  <-chan time.Time
	)
	for {
		select {
		case line, ok := <-v.lines:
			if !ok {
				t.Errorf("the machine ended by itself:\n%s", &last)
				return
			}
			fmt.Fprintln(&last, line)
			if after := seen(line); after != nil && cut == nil {
				cut = time.After(*after)
			}
		case <-cut:
			return
		case <-ctx.Done():
			t.Errorf("the machine hangs: %v\n%s", ctx.Err(), &last)
			return
		}
	}
}

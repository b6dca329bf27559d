// Package script is a small language for what goes wrong between a node and its
// registry, and on its disk; and the player that acts a script out.
//
//	# One fault a line: what, and then where and when.
//	status 503 retry-after 1s on manifests for 2
//	hang body at 100kB after 3
//	disk full for 2s
//	expect right
//
// docs/FAULTS.md tells each word.
//
//	script.go  what a script is: parsing and printing
//	kinds.go   the faults, by name
//	body.go    bodies that are not what they should be
//	player.go  which faults a request meets
//	doors.go   tokens and signed URLs that expire
//	random.go  scripts by chance
//
// It knows HTTP and the paths of the distribution protocol; it knows no program
// that is put to the test.
package script

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Script is what is to go wrong.
type Script struct {
	Faults []Fault
	// Expect is what becomes of readers who have nobody else to ask while the faults
	// last: one of Right, Fails and Either.
	Expect string
}

// What Script.Expect may be.
const (
	Either = ""      // a read may fail
	Right  = "right" // none does
	Fails  = "EIO"   // some do
)

// Fault is one line.
type Fault struct {
	Kind string   // "hang body"
	Args [2]int64 // of the kind: numbers, bytes, or nanoseconds

	// On is whose requests are meant: "" (blobs), "packs", "manifests", "tokens", "all", or a
	// part of a path, with a slash in it.
	On string
	// After so many of these, or so much time, it begins, and it ends after For; then
	// each request of these that is the Every-th meets it (0 is 1).
	After, For Span
	Every      int
}

// Span is a number of requests or a time; the zero Span is nothing, or for ever.
type Span struct {
	Requests int
	Time     time.Duration
}

// Bounds of what is parsed.
const (
	maxLine   = 1000
	maxFaults = 1000
	maxCount  = 1 << 30
	maxTime   = 24 * time.Hour
)

// Parse reads a script. Errors name the line.
func Parse(r io.Reader) (*Script, error) {
	s := &Script{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	for n := 1; lines.Scan(); n++ {
		line, _, _ := strings.Cut(lines.Text(), "#")
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if words[0] == "expect" {
			if len(words) != 2 || words[1] != Right && words[1] != Fails {
				return nil, fmt.Errorf("line %d: want expect %s or expect %s", n, Right, Fails)
			}
			s.Expect = words[1]
			continue
		}
		f, err := parseFault(words)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if len(s.Faults) == maxFaults {
			return nil, fmt.Errorf("line %d: more than %d faults", n, maxFaults)
		}
		s.Faults = append(s.Faults, f)
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	return s, nil
}

// String is the script as Parse reads it.
func (s *Script) String() string {
	var b strings.Builder
	for _, f := range s.Faults {
		fmt.Fprintln(&b, f)
	}
	if s.Expect != Either {
		fmt.Fprintln(&b, "expect", s.Expect)
	}
	return b.String()
}

// Packs tells whether it takes an image with a start pack.
func (s *Script) Packs() bool {
	return slices.ContainsFunc(s.Faults, func(f Fault) bool { return f.On == "packs" })
}

// Disk tells whether it takes a disk that can fail.
func (s *Script) Disk() bool {
	return slices.ContainsFunc(s.Faults, func(f Fault) bool { return kinds[f.Kind].disk })
}

// Network tells whether something is wrong between node and registry, too.
func (s *Script) Network() bool {
	return slices.ContainsFunc(s.Faults, func(f Fault) bool { return !kinds[f.Kind].disk })
}

// Has tells whether one of its faults is of one of the kinds.
func (s *Script) Has(kinds ...string) bool {
	return slices.ContainsFunc(s.Faults, func(f Fault) bool { return slices.Contains(kinds, f.Kind) })
}

// Quota returns what the pool may take, in bytes; 0 if nothing is said.
func (s *Script) Quota() int64 {
	for _, f := range s.Faults {
		if f.Kind == "quota" {
			return f.Args[0]
		}
	}
	return 0
}

func parseFault(words []string) (f Fault, err error) {
	for n := min(3, len(words)); n > 0; n-- {
		if name := strings.Join(words[:n], " "); kinds[name] != nil {
			f.Kind, words = name, words[n:]
			break
		}
	}
	k := kinds[f.Kind]
	if k == nil {
		return f, fmt.Errorf("%.40q: no such fault", strings.Join(words, " "))
	}
	for i, a := range k.args {
		f.Args[i] = a.value
		if a.word != "" && (len(words) == 0 || words[0] != a.word) {
			continue
		}
		if a.word != "" {
			words = words[1:]
		}
		if len(words) == 0 {
			return f, fmt.Errorf("%s: something is missing at the end", f.Kind)
		}
		if f.Args[i], err = a.parse(words[0]); err != nil {
			return f, fmt.Errorf("%s: %w", f.Kind, err)
		}
		words = words[1:]
	}
	for len(words) > 0 {
		if len(words) < 2 {
			return f, fmt.Errorf("%s: %.40q: want on, after, for or every, and what", f.Kind, words[0])
		}
		switch word, value := words[0], words[1]; word {
		case "on":
			f.On = value
			if value == "blobs" {
				f.On = ""
			}
			if !slices.Contains([]string{"blobs", "packs", "manifests", "tokens", "all"}, value) && !strings.Contains(value, "/") {
				err = fmt.Errorf("on %.40q: want blobs, packs, manifests, tokens, all or a part of a path, with a slash", value)
			}
		case "after":
			f.After, err = parseSpan(value)
		case "for":
			f.For, err = parseSpan(value)
		case "every":
			var n int64
			n, err = number.parse(value)
			f.Every = int(n)
		default:
			err = fmt.Errorf("%.40q: want on, after, for or every", word)
		}
		if err != nil {
			return f, fmt.Errorf("%s: %w", f.Kind, err)
		}
		words = words[2:]
	}
	if k.disk && (f.On != "" || f.After.Requests+f.For.Requests+f.Every > 0) || k.lasts && f.For.Requests+f.Every > 0 {
		return f, fmt.Errorf("%s: this lasts for a time, not for requests", f.Kind)
	}
	return f, nil
}

// String is the fault as a line.
func (f Fault) String() string {
	words := []string{f.Kind}
	for i, a := range kinds[f.Kind].args {
		switch {
		case a.word == "":
			words = append(words, a.format(f.Args[i]))
		case f.Args[i] != a.value:
			words = append(words, a.word, a.format(f.Args[i]))
		}
	}
	if f.On != "" {
		words = append(words, "on", f.On)
	}
	for _, x := range []struct {
		word string
		span Span
	}{{"after", f.After}, {"for", f.For}, {"every", Span{Requests: f.Every}}} {
		if x.span != (Span{}) {
			words = append(words, x.word, x.span.String())
		}
	}
	return strings.Join(words, " ")
}

func (s Span) String() string {
	if s.Time > 0 {
		return s.Time.String()
	}
	return strconv.Itoa(s.Requests)
}

func parseSpan(s string) (Span, error) {
	if n, err := number.parse(s); err == nil {
		return Span{Requests: int(n)}, nil
	}
	n, err := duration.parse(s)
	return Span{Time: time.Duration(n)}, err
}

// arg is an argument of a fault: a unit, behind a word, "" if it must be there.
type arg struct {
	unit
	word  string
	value int64 // if it is not there
}

// unit is how numbers are written.
type unit struct {
	parse  func(string) (int64, error)
	format func(int64) string
}

func decimal(n int64) string { return strconv.FormatInt(n, 10) }

var (
	number = unit{ // never 0
		func(s string) (int64, error) {
			n, err := strconv.ParseUint(s, 10, 31)
			if err != nil || n == 0 || n > maxCount {
				return 0, fmt.Errorf("%.40q: want a number", s)
			}
			return int64(n), nil
		},
		decimal,
	}
	code = unit{
		func(s string) (int64, error) {
			n, err := strconv.ParseUint(s, 10, 31)
			if err != nil || n < 200 || n > 599 {
				return 0, fmt.Errorf("%.40q: want a status code of HTTP", s)
			}
			return int64(n), nil
		},
		decimal,
	}
	duration = unit{
		func(s string) (int64, error) {
			d, err := time.ParseDuration(s)
			if err != nil || d <= 0 || d > maxTime {
				return 0, fmt.Errorf("%.40q: want a time, such as 2s", s)
			}
			return int64(d), nil
		},
		func(n int64) string { return time.Duration(n).String() },
	}
	size = unit{
		func(s string) (int64, error) {
			digits, scale := strings.TrimSuffix(s, "/s"), int64(1)
			for _, u := range []struct {
				name  string
				scale int64
			}{{"kB", 1e3}, {"MB", 1e6}, {"B", 1}} {
				if rest, ok := strings.CutSuffix(digits, u.name); ok {
					digits, scale = rest, u.scale
					break
				}
			}
			n, err := strconv.ParseUint(digits, 10, 31)
			if err != nil || n == 0 {
				return 0, fmt.Errorf("%.40q: want bytes, such as 100kB", s)
			}
			return int64(n) * scale, nil
		},
		func(n int64) string {
			switch {
			case n%1e6 == 0:
				return fmt.Sprintf("%dMB", n/1e6)
			case n%1e3 == 0:
				return fmt.Sprintf("%dkB", n/1e3)
			}
			return fmt.Sprintf("%dB", n)
		},
	}
)

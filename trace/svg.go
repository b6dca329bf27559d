package trace

import (
	"bufio"
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"strings"
	"time"
)

// The picture, in pixels.
const (
	svgLabels = 330  // file names, left
	svgTimes  = 760  // the time axis
	svgSums   = 230  // sums of a file, right
	svgRow    = 16   // a file
	svgTop    = 84   // above the first
	svgRows   = 400  // files at most
	svgMin    = 1.5  // the shortest bar: what is shorter is seen all the same
	svgName   = 52   // characters of a name
	svgWaited = 1e-4 // seconds from which on a wait is worth a bar
)

// SVG draws a trace as a waterfall: time from left to right, the files from top to
// bottom in the order of their first reads, a tick for what was there when it was
// read and a bar for what somebody waited for, as long as that took. The picture
// needs nothing else and nobody's fonts.
func (t *Trace) SVG(w io.Writer, title string) error {
	files := t.ByFile()
	more := max(0, len(files)-svgRows)
	shown := files[:len(files)-more]
	var end time.Duration
	for i := range t.Blocks {
		end = max(end, t.Blocks[i].At+t.Blocks[i].Wait)
	}
	step := svgStep(end)
	end = (end/step + 1) * step
	x := func(d time.Duration) float64 { return svgLabels + float64(d)/float64(end)*svgTimes }
	bottom := svgTop + len(shown)*svgRow
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, `<svg xmlns="http://www.w3.org/2000/svg" width="%[1]d" height="%[2]d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="11">`+"\n",
		svgLabels+svgTimes+svgSums, bottom+40)
	fmt.Fprintf(b, `<rect width="100%%" height="100%%" fill="#fff"/>`+"\n")
	text := func(x float64, y int, attrs, s string) {
		fmt.Fprintf(b, `<text x="%.1f" y="%d" %s>`, x, y, attrs)
		_ = xml.EscapeText(b, []byte(s)) // an error comes back from Flush
		b.WriteString("</text>\n")
	}
	text(12, 24, `font-size="15" font-weight="bold" fill="#222"`, title)
	text(12, 44, `fill="#555"`, t.Summary())
	fmt.Fprintf(b, `<rect x="12" y="55" width="12" height="9" fill="%s"/>`+"\n", svgRed)
	text(28, 63, `fill="#555"`, "waited for")
	fmt.Fprintf(b, `<rect x="98" y="55" width="3" height="9" fill="%s"/>`+"\n", svgBlue)
	text(106, 63, `fill="#555"`, "was there, or came along")
	for at := time.Duration(0); at <= end; at += step {
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#ddd"/>`+"\n", x(at), x(at), svgTop-6, bottom+4)
		text(x(at), svgTop-10, `text-anchor="middle" fill="#555"`, svgTime(at))
		text(x(at), bottom+18, `text-anchor="middle" fill="#555"`, svgTime(at))
	}
	for i, f := range shown {
		y := svgTop + i*svgRow
		if i%2 == 1 {
			fmt.Fprintf(b, `<rect x="0" y="%d" width="100%%" height="%d" fill="#000" fill-opacity="0.03"/>`+"\n", y, svgRow)
		}
		text(svgLabels-8, y+12, `text-anchor="end" fill="#222"`, elide(f.Path))
		text(svgLabels+svgTimes+10, y+12, `fill="#555"`, fmt.Sprintf("%d KiB%s%s", (f.Bytes+1023)>>10, f.share(t), waited(f.Wait)))
		f.draw(b, x, y)
	}
	if more > 0 {
		text(svgLabels-8, bottom+32, `text-anchor="end" fill="#555"`, fmt.Sprintf("and %d more files", more))
	}
	b.WriteString("</svg>\n")
	return b.Flush()
}

// share says how many of the runs have read of a file, if there are several.
func (f *File) share(t *Trace) string {
	if len(t.Runs) < 2 {
		return ""
	}
	return fmt.Sprintf(", %d of %d runs", f.By.Len(), len(t.Runs))
}

const svgRed, svgBlue = "#d9480f", "#1c7ed6"

// draw draws one row: ticks first, so that no wait is hidden.
func (f *File) draw(w io.Writer, x func(time.Duration) float64, y int) {
	var ticks strings.Builder
	last := math.Inf(-1)
	for _, b := range f.Blocks {
		if at := x(b.At); b.Wait.Seconds() < svgWaited && at >= last+svgMin/2 { // what lies on another is not seen
			fmt.Fprintf(&ticks, "M%.1f %dv%d", at, y+3, svgRow-6)
			last = at
		}
	}
	if ticks.Len() > 0 {
		fmt.Fprintf(w, `<path d="%s" stroke="%s" stroke-width="%g"/>`+"\n", ticks.String(), svgBlue, svgMin)
	}
	for _, b := range f.Blocks {
		if b.Wait.Seconds() >= svgWaited {
			fmt.Fprintf(w, `<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s" fill-opacity="0.8"><title>offset %d: waited %v</title></rect>`+"\n",
				x(b.At), y+3, max(svgMin, x(b.At+b.Wait)-x(b.At)), svgRow-6, svgRed, b.Offset, b.Wait)
		}
	}
}

// svgStep is a round time that about ten of make up a trace.
func svgStep(end time.Duration) time.Duration {
	for step := time.Millisecond; ; step *= 10 {
		for _, k := range []time.Duration{1, 2, 5} {
			if end/(k*step) < 12 {
				return k * step
			}
		}
	}
}

func svgTime(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.4g s", d.Seconds())
}

func waited(d time.Duration) string {
	if d.Seconds() < svgWaited {
		return ""
	}
	return fmt.Sprintf(", waited %.1f ms", d.Seconds()*1e3)
}

// elide leaves the end of a name that is too long.
func elide(s string) string {
	r := []rune(s)
	if len(r) <= svgName {
		return s
	}
	return "…" + string(r[len(r)-svgName+1:])
}

package convert

import (
	"testing"

	"github.com/shale-image/shale/image"
)

// BenchmarkConvert converts the Debian image of bench/debian, of two gzip
// layers, from one layout to another.
func BenchmarkConvert(b *testing.B) {
	src := open(b, "oci:"+debianImage(b))
	for b.Loop() {
		dst := open(b, "oci:"+b.TempDir()+":x")
		res, err := Convert(b.Context(), src, dst, Options{Platform: image.Platform{OS: "linux", Architecture: "amd64"}})
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(res.ContentBytes)
		b.ReportMetric(float64(res.Bytes)/1e6, "MB-out")
	}
}

package erofs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"sort"

	"github.com/shale-image/shale/index"
)

// Image is an opened image. Its methods may be called concurrently if the
// ReaderAt allows that.
type Image struct {
	r       io.ReaderAt
	size    int64
	name    string
	super   Super
	devices []Device
	ext     []byte
}

// Open reads the super block and the device table of an image of size bytes.
// The image keeps r, which the caller closes after its last use. name is for
// errors: they wrap index.ErrCorrupt or index.ErrUnsupported for what is wrong
// with the image, or what r returned.
func Open(r io.ReaderAt, size int64, name string) (*Image, error) {
	v := &view{r: r, size: size, name: name}
	block0, err := v.read(0, BlockSize)
	if err != nil {
		return nil, err
	}
	sb, le := block0[superOff:], binary.LittleEndian
	if m := le.Uint32(sb[sbMagic:]); m != superMagic {
		return nil, v.errorf(index.ErrCorrupt, superOff, "magic is %#x, EROFS has %#x", m, uint32(superMagic))
	}
	s := Super{
		BlockBits:       sb[sbBlockBits],
		RootNID:         uint64(le.Uint16(sb[sbRootNID:])),
		Inodes:          le.Uint64(sb[sbInodes:]),
		Blocks:          le.Uint32(sb[sbBlocks:]),
		MetaBlkaddr:     le.Uint32(sb[sbMetaBlkaddr:]),
		XattrBlkaddr:    le.Uint32(sb[sbXattrBlkaddr:]),
		FeatureCompat:   le.Uint32(sb[sbCompat:]),
		FeatureIncompat: le.Uint32(sb[sbIncompat:]),
		UUID:            [16]byte(sb[sbUUID:]),
		BuildTime:       index.Time{Sec: int64(le.Uint64(sb[sbEpoch:])), Nsec: le.Uint32(sb[sbNsec:])},
		ExtraDevices:    le.Uint16(sb[sbExtraDevices:]),
		DevtSlotOff:     le.Uint16(sb[sbDevtSlotOff:]),
		Checksum:        le.Uint32(sb[sbChecksum:]),
	}
	if s.BlockBits != BlockBits || sb[sbDirBlockBits] != 0 {
		return nil, v.errorf(index.ErrUnsupported, superOff+sbBlockBits, "blocks of 2^%d bytes and directory blocks of 2^%d, want 2^%d and 2^0", s.BlockBits, sb[sbDirBlockBits], BlockBits)
	}
	if err := checkIncompat(v, s.FeatureIncompat); err != nil {
		return nil, err
	}
	if s.FeatureCompat&CompatChecksum != 0 {
		if sum := checksum(block0); sum != s.Checksum {
			return nil, v.errorf(index.ErrCorrupt, superOff+sbChecksum, "checksum is %08x, the super block has %08x", sum, s.Checksum)
		}
	}
	if s.BuildTime.Nsec >= 1e9 {
		return nil, v.errorf(index.ErrCorrupt, superOff+sbNsec, "time has %d ns", s.BuildTime.Nsec)
	}
	im := &Image{r: r, size: size, name: name, super: s, ext: bytes.Clone(block0[extOff:][:MaxExt])}
	if s.FeatureIncompat&incompatDeviceTable == 0 {
		return im, nil
	}
	table := int64(s.DevtSlotOff) * slotSize
	if err := v.check(table, int64(s.ExtraDevices)*slotSize); err != nil {
		return nil, fmt.Errorf("device table: %w", err)
	}
	im.devices = make([]Device, s.ExtraDevices)
	for i := range im.devices {
		b, err := v.read(table+int64(i)*slotSize, slotSize)
		if err != nil {
			return nil, err
		}
		im.devices[i] = Device{
			Tag:    string(bytes.TrimRight(b[:maxTag], "\x00")),
			Blocks: le.Uint32(b[maxTag:]),
			Mapped: le.Uint32(b[maxTag+4:]),
		}
	}
	return im, nil
}

func checkIncompat(v *view, have uint32) error {
	for bit := range 32 {
		if (have&^(incompatChunkedFile|incompatDeviceTable))>>bit&1 == 0 {
			continue
		}
		name := fmt.Sprintf("bit %d", bit)
		if bit < len(incompatNames) {
			name = incompatNames[bit]
		}
		return v.errorf(index.ErrUnsupported, superOff+sbIncompat, "the image needs the feature %s", name)
	}
	return nil
}

// Super returns the super block.
func (im *Image) Super() Super { return im.super }

// locate returns where a chunk index says that data are: in device 0 is the flat
// address space, where devices are mapped in their order. The device is 0 if the
// data are in none.
func (im *Image) locate(device uint16, block uint32) (uint16, uint32) {
	if device > 0 {
		return device, block
	}
	i := sort.Search(len(im.devices), func(i int) bool { return im.devices[i].Mapped > block })
	if i == 0 || block-im.devices[i-1].Mapped >= im.devices[i-1].Blocks {
		return 0, block
	}
	return uint16(i), block - im.devices[i-1].Mapped
}

// Devices returns the device table. The caller may keep it.
func (im *Image) Devices() []Device { return slices.Clone(im.devices) }

// Ext returns the MaxExt bytes after the super block. The caller may keep
// them.
func (im *Image) Ext() []byte { return bytes.Clone(im.ext) }

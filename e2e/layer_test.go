package e2e

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
)

// awkward makes what a plain Debian image lacks, and takes something away.
const awkward = `set -e
mkdir -p odd/deep/er odd/opaque usr/bin
cd odd
printf x > one; ln one two; ln one deep/three
mknod null c 1 3; mknod loop b 7 300; mkfifo pipe
printf '#!/bin/sh\n' > suid; chown 12345:70000 suid; chmod 4751 suid; mkdir sticky; chmod 1777 sticky
printf data > attrs
setfattr -n user.empty attrs
setfattr -n user.binary -v 0x00ff0a80 attrs
setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 suid
setfattr -n user.dir -v yes deep
truncate -s 3000001 holes; printf hi | dd of=holes bs=1 seek=1500000 conv=notrunc status=none
head -c 200000 /dev/urandom > big
touch -d '1901-12-13T20:45:53.123456789Z' old; touch -d '2033-05-18T03:33:20.000000001Z' new
printf n > "$(printf 'b\377d\ntab\there')"
ln -s ../../../../../outside dangling; ln -s "$(head -c 3000 /dev/zero | tr '\0' l)" longlink
printf x > "$(head -c 255 /dev/zero | tr '\0' n)"
for i in $(seq 1 3000); do : > deep/er/file-$i; done
cd ..
: > usr/share-doc.tmp; rm usr/share-doc.tmp
mkdir -p usr/share; : > usr/share/.wh.doc
`

// addLayer copies a layout and gives its image one more layer.
func addLayer(from, to string) (string, error) {
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	dir, err := os.MkdirTemp("", "shale-e2e-layer-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command("bash", "-c", awkward)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make the awkward layer: %w: %s", err, out)
	}
	tar, err := exec.Command("tar", "-C", dir, "--format=posix", "--xattrs", "--xattrs-include=*", "--sparse", "-c", "odd", "usr").Output()
	if err != nil {
		return "", err
	}
	var z bytes.Buffer
	zw := gzip.NewWriter(&z)
	zw.Write(tar)
	zw.Close()

	var index, man, config map[string]any
	read := func(path string, v any) {
		if err == nil {
			var b []byte
			if b, err = os.ReadFile(path); err == nil {
				err = json.Unmarshal(b, v)
			}
		}
	}
	write := func(b []byte) map[string]any {
		sum := sha256.Sum256(b)
		digest := "sha256:" + hex.EncodeToString(sum[:])
		if err == nil {
			err = os.WriteFile(blobPath(to, digest), b, 0o644)
		}
		return map[string]any{"digest": digest, "size": len(b)}
	}
	set := func(d map[string]any, b []byte) {
		for k, v := range write(b) {
			d[k] = v
		}
	}
	encode := func(v any) []byte { b, _ := json.Marshal(v); return b }
	read(filepath.Join(to, "index.json"), &index)
	if err != nil {
		return "", err
	}
	top := index["manifests"].([]any)[0].(map[string]any)
	read(blobPath(to, top["digest"].(string)), &man)
	if err != nil {
		return "", err
	}
	cd := man["config"].(map[string]any)
	read(blobPath(to, cd["digest"].(string)), &config)
	if err != nil {
		return "", err
	}
	diff := sha256.Sum256(tar)
	rootfs := config["rootfs"].(map[string]any)
	rootfs["diff_ids"] = append(rootfs["diff_ids"].([]any), "sha256:"+hex.EncodeToString(diff[:]))
	set(cd, encode(config))
	layer := write(z.Bytes())
	layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip"
	man["layers"] = append(man["layers"].([]any), layer)
	set(top, encode(man))
	if err == nil {
		err = os.WriteFile(filepath.Join(to, "index.json"), encode(index), 0o644)
	}
	return to, err
}

// manifest is what of the converted image's manifest the tests use.
type manifest struct {
	Config struct {
		Digest string `json:"digest"`
	} `json:"config"`
	Layers []struct {
		Digest      string            `json:"digest"`
		Size        int64             `json:"size"`
		Annotations map[string]string `json:"annotations"`
	} `json:"layers"`
}

func (w *world) readManifest() error {
	req, err := http.NewRequest("GET", w.registry.URL()+"/v2/e2e/debian/manifests/shale", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/vnd.oci.image.manifest.v1+json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return json.NewDecoder(resp.Body).Decode(&w.manifest)
}

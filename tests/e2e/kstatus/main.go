// Judges Kubernetes objects as Flux and `helm install --wait` do: with kstatus.
//
// Reads one JSON object per line; writes, for each, one line: the verdict, a tab, the reason in words.
package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

var oneLine = strings.NewReplacer("\r", " ", "\n", " ")

func main() {
	in := bufio.NewReader(os.Stdin)
	for number := 1; ; number++ {
		line, err := in.ReadBytes('\n') // not a Scanner: an object may be longer than its 64 KiB
		ended := errors.Is(err, io.EOF)
		if err != nil && !ended {
			fail(number, err)
		}
		line = bytes.TrimSpace(line)
		if ended && len(line) == 0 {
			return
		}
		verdict, message, err := judge(line)
		if err != nil {
			fail(number, err)
		}
		if _, err := fmt.Printf("%s\t%s\n", verdict, oneLine.Replace(message)); err != nil {
			fail(number, err)
		}
	}
}

// judge errs on what is no object; an object that kstatus cannot read is Unknown.
func judge(line []byte) (status.Status, string, error) {
	// UnmarshalJSON keeps whole numbers whole: kstatus refuses a generation that encoding/json made a float64.
	object := &unstructured.Unstructured{}
	if err := object.UnmarshalJSON(line); err != nil {
		return "", "", err
	}
	result, err := status.Compute(object)
	if err != nil {
		return status.UnknownStatus, err.Error(), nil
	}
	return result.Status, result.Message, nil
}

func fail(line int, err error) {
	fmt.Fprintf(os.Stderr, "line %d: %v\n", line, err)
	os.Exit(1)
}
